"""The C library's heap while weights are packed: large blocks that are freed are given back at once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

#: glibc's names of two limits, from its malloc.h: what is freed on top of the heap stays up to the first; blocks from
#: the second on are mapped by themselves.
_TRIM, _MMAP = -1, -3
#: Below every temporary of packing, which are pieces of 4 MB and whole weights.
_WHILE_PACKING = 1 << 20
#: What glibc ends with by itself once it has seen blocks of that size freed: the most it allows.
_AFTERWARDS = 32 << 20


@contextmanager
def freed_blocks_return() -> Iterator[None]:
    """Keeps the heap from growing around holes.

    glibc takes blocks below a limit from its heap, and raises the limit to the size of whatever is freed, up to 32 MB.
    Temporaries of packing then lie between weights that stay, and leave holes: loading peaked at 1.11 to 1.33 times the
    packed weights, another number in every run; with the limit held at 1 MB it is 1.16 to 1.21. Afterwards the limits
    are those that glibc would have come to, so that an inference does not map its temporaries anew each time.
    Other C libraries have no such limits, and nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP, _WHILE_PACKING)
    try:
        yield
    finally:
        mallopt(_MMAP, _AFTERWARDS)
        mallopt(_TRIM, 2 * _AFTERWARDS)

"""Named ranges for NVIDIA's profilers: every op call as one, and stages and layers around them."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

from pi0_engine.kernels.registry import OpFunction, Ops, all_ops


class RangedOps(Ops):
    """Real ops, each call inside an nvtx range of its name."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(
            {name: functools.partial(_ranged, name, getattr(ops, name)) for name in all_ops()},
            ops.choices,
            ops.launcher,
        )

    def range(self, name: str) -> AbstractContextManager[Any]:
        import nvtx

        context: AbstractContextManager[Any] = nvtx.annotate(name, domain="pi0_engine")
        return context


def with_ranges(ops: Ops) -> Ops:
    """``ops`` with ranges.

    Raises:
        ValueError: nvtx is not installed.
    """
    if find_spec("nvtx") is None:
        raise ValueError("nvtx ranges were asked for, but nvtx is not installed: pip install 'pi0-engine[gpu]'")
    return RangedOps(ops)


def _ranged(name: str, function: OpFunction, *args: Any, **kwargs: Any) -> None:
    import nvtx

    with nvtx.annotate(name, domain="pi0_engine"):
        function(*args, **kwargs)

"""Camera frames -> the two flat buffers from which the engine's device resizes them (kernels/frames.py).

The host only copies bytes here and computes a few thousand weights; a GPU reads them, does what
:class:`pi0_engine.images.resize.FramePreprocessor` does, bit for bit, and cuts the result into patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pi0_engine.images.resize import EXTENSION_NEEDS, Frame, check_frame


class PackedSize(NamedTuple):
    """Lengths of the two buffers: ``bytes`` of pixels (uint8), ``ints`` of the table (int32)."""

    bytes: int
    ints: int


def staging_size(sides: Sequence[tuple[int, int]], size: int = 224) -> PackedSize:
    """Buffers that hold frames of these sides, or of smaller ones, in any order.

    Args:
        sides: (height, width) of each frame, in pixels.
        size: side of the square that they are scaled to fit.

    Raises:
        ValueError: a side or size out of range.
        RuntimeError: the extension is not installed.
    """
    extension = _extension()
    most = [extension.packed_size(height, width, size) for height, width in sides]
    return PackedSize(sum(used for used, _ in most), sum(used for _, used in most))


class FrameStaging:
    """Packs frames into buffers of the caller, such as views of pinned memory. Nothing is allocated per call.

    Args:
        pixels, table: uint8 and int32, one-dimensional, contiguous and writeable; see :func:`staging_size`.
        size: side of the square that the frames are scaled to fit.

    Raises:
        ValueError: a buffer of another kind.
        RuntimeError: the extension ``pi0_engine._C`` is not installed.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], table: npt.NDArray[np.int32], size: int = 224) -> None:
        for name, buffer, dtype in (("pixels", pixels, np.uint8), ("table", table, np.int32)):
            if not isinstance(buffer, np.ndarray) or buffer.dtype != dtype or buffer.ndim != 1:
                raise ValueError(f"{name} must be a one-dimensional numpy array of {np.dtype(dtype)}")
            if not buffer.flags.c_contiguous or not buffer.flags.writeable:
                raise ValueError(f"{name} is read-only or has gaps, expected a writeable contiguous array")
        self.pixels, self.table, self.size = pixels, table, size
        self._pack = _extension().pack_frames

    def pack(self, frames: Sequence[Frame]) -> PackedSize:
        """Write ``frames`` into the buffers.

        Args:
            frames: uint8 [H, W, 3] each, of any size and any strides.

        Returns:
            How much of each buffer is in use: no more need be copied to the device.

        Raises:
            ValueError: a frame of another kind, or more than fits; the buffers are then undefined.
        """
        for index, frame in enumerate(frames):
            check_frame(frame, f"frame {index}")
        return PackedSize(*self._pack(frames, self.size, self.pixels, self.table))


def _extension() -> ModuleType:
    try:
        from pi0_engine import _C
    except ImportError as error:
        raise RuntimeError(
            f"frames cannot be packed: the extension pi0_engine._C cannot be imported ({error}); {EXTENSION_NEEDS}"
        ) from error
    return _C

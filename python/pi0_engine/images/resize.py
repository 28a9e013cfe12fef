"""Camera frames -> the pixels the network sees: scaled to fit, centred on black, in [-1, 1].

The sizes, rounding and filter are those of openpi (openpi-client's ``image_tools.py``, then ``pixel / 255 * 2 - 1``).
Two implementations give the same result: ``cpp`` (the extension ``pi0_engine._C``) and ``pillow``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Frame = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float32]

#: Why there may be no extension.
EXTENSION_NEEDS = "it is compiled at installation where a C++17 compiler and Python's headers are present"

#: More threads than this gain nothing on a few camera frames.
_MAX_THREADS = 4
#: The longest side of a frame, in pixels (csrc/resize_with_pad.h).
MAX_SIDE = 1 << 20

_log = logging.getLogger(__name__)


class FramePreprocessor:
    """Resizes uint8 RGB frames for the vision tower. Which implementation does it is decided here, once.

    Args:
        implementation: ``"cpp"``, ``"pillow"``, or ``"auto"``: ``cpp`` where it is installed, else ``pillow`` with a
            logged warning.
        size: side of the square result, in pixels.
        threads: upper limit of the ``cpp`` implementation; ``None`` takes the processors of this process, at most 4.

    Attributes:
        implementation: ``"cpp"`` or ``"pillow"``.
        reason: why, in a sentence.
        size, threads: as given or decided.

    Raises:
        ValueError: an unknown implementation, a size or a number of threads below 1.
        RuntimeError: ``"cpp"`` was asked for and is not installed.
    """

    implementation: Literal["cpp", "pillow"]
    reason: str

    def __init__(
        self,
        implementation: Literal["auto", "cpp", "pillow"] = "auto",
        size: int = 224,
        threads: int | None = None,
    ) -> None:
        if implementation not in ("auto", "cpp", "pillow"):
            raise ValueError(f"implementation is {implementation!r}, expected 'auto', 'cpp' or 'pillow'")
        if not 1 <= size <= MAX_SIDE:
            raise ValueError(f"size is {size}, expected 1 to {MAX_SIDE} pixels")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        self.size = size
        self.threads = threads if threads is not None else min(_available_processors(), _MAX_THREADS)
        if implementation == "pillow":
            self.implementation, self.reason = "pillow", "asked for by name"
            return
        try:
            from pi0_engine import _C
        except ImportError as error:
            why = f"the extension pi0_engine._C cannot be imported ({error}); {EXTENSION_NEEDS}"
            if implementation == "cpp":
                raise RuntimeError(f"implementation 'cpp' is unavailable: {why}") from error
            _log.warning("frames are resized by Pillow: %s", why)
            self.implementation, self.reason = "pillow", why
        else:
            self._resize_cpp = _C.resize_with_pad
            self.implementation = "cpp"
            self.reason = "asked for by name" if implementation == "cpp" else "the extension pi0_engine._C is installed"

    def __call__(self, frames: Sequence[Frame], out: Pixels | None = None) -> Pixels:
        """Resize N frames.

        Args:
            frames: N >= 1 arrays uint8 [H, W, 3], each of any size and any strides (a flipped or transposed view is
                read in place).
            out: where to write, float32 [N, size, size, 3], C-contiguous; allocated if not given.

        Returns:
            ``out``: float32 [N, size, size, 3] in [-1, 1]; black, also around the picture, is -1.

        Raises:
            ValueError: a frame or ``out`` of another dtype, shape or layout; names what was given and expected.
        """
        if out is None:
            out = np.empty((len(frames), self.size, self.size, 3), np.float32)
        self._resize(frames, self.size, out, (len(frames), self.size, self.size, 3))
        return out

    def patches(self, frames: Sequence[Frame], patch: int, out: Pixels) -> None:
        """Resize N frames and cut them into squares of ``patch`` pixels, as the vision tower reads them.

        Args:
            frames: as of a call.
            patch: divides ``size``.
            out: where to write, float32 [N, (size / patch)^2, patch * patch * 3], C-contiguous: patches row-major in
                the picture, pixels row-major in the patch, channel fastest.

        Raises:
            ValueError: as of a call; a ``patch`` that does not divide ``size``.
        """
        if patch < 1 or self.size % patch:
            raise ValueError(f"patch is {patch}, expected a divisor of {self.size}")
        self._resize(frames, patch, out, (len(frames), (self.size // patch) ** 2, patch * patch * 3))

    def _resize(self, frames: Sequence[Frame], patch: int, out: Pixels, shape: tuple[int, ...]) -> None:
        """A whole picture is one patch."""
        frames = list(frames)
        if not frames:
            raise ValueError("frames is empty, expected at least one uint8 [height, width, 3] array")
        for index, frame in enumerate(frames):
            check_frame(frame, f"frame {index}")
        _check_out(out, shape)
        if self.implementation == "cpp":
            self._resize_cpp(frames, self.size, patch, out, self.threads)
            return
        grid = self.size // patch
        for frame, target in zip(frames, out, strict=True):
            tiles = _resize_pillow(frame, self.size).reshape(grid, patch, grid, patch, 3)
            target.reshape(grid, grid, patch, patch, 3)[...] = tiles.swapaxes(1, 2)


def resize_with_pad(frame: Frame, size: int = 224) -> Pixels:
    """One frame uint8 [H, W, 3] -> float32 [size, size, 3] in [-1, 1]; see :class:`FramePreprocessor`."""
    check_frame(frame, "frame")
    pixels: Pixels = _default_preprocessor(size)([frame])[0]
    return pixels


@functools.lru_cache(maxsize=8)
def _default_preprocessor(size: int) -> FramePreprocessor:
    return FramePreprocessor(size=size)


def _resize_pillow(frame: Frame, size: int) -> Pixels:
    """uint8 [H, W, 3] -> float32 [size, size, 3], by Pillow."""
    height, width = frame.shape[:2]
    ratio = max(width / size, height / size)
    # Truncated, as in openpi. A side of less than one pixel, an error there, becomes one pixel.
    new_height, new_width = max(int(height / ratio), 1), max(int(width / ratio), 1)
    image = Image.fromarray(np.ascontiguousarray(frame))
    scaled = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    top, left = (size - new_height) // 2, (size - new_width) // 2
    out = np.full((size, size, 3), -1.0, np.float32)
    out[top : top + new_height, left : left + new_width] = scaled.astype(np.float32) / 255 * 2 - 1
    return out


def check_frame(frame: Frame, name: str) -> None:
    """Raise a ValueError that calls it ``name`` if ``frame`` is not uint8 [H, W, 3] with sides in range."""
    expected = "expected a numpy array, uint8 [height, width, 3]"
    if not isinstance(frame, np.ndarray):
        raise ValueError(f"{name} is {type(frame).__name__}, {expected}")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"{name} is {frame.dtype} {list(frame.shape)}, {expected}")
    if not all(1 <= side <= MAX_SIDE for side in frame.shape[:2]):
        raise ValueError(f"{name} is {list(frame.shape)}, expected sides of 1 to {MAX_SIDE} pixels")


def _check_out(out: Pixels, shape: tuple[int, ...]) -> None:
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != shape:
        given = f"{out.dtype} {list(out.shape)}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out is {given}, expected float32 {list(shape)}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out is read-only or not C-contiguous, expected a writeable C-contiguous array")


def _available_processors() -> int:
    """Processors this process may use; on systems that do not say, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

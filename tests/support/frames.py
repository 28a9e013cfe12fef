"""Camera frames for the image tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.paths import DATA

_RECORDED = np.load(DATA / "openpi_client_resize.npz")

#: ``"HxW"`` of the textured frames that openpi-client 0.1.2 (with Pillow 12.0) was recorded on.
RECORDED_SIZES: list[str] = _RECORDED.files

needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("pi0_engine._C") is None,
    reason="pi0_engine._C is not built (no C++ compiler, or no Python headers, at installation)",
)


def textured_frame(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Fine patterns, different in every channel: uint8 [height, width, 3]."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((7 * y + 13 * x + 101 * c + 3 * (x * y % 97) + (x ^ y) * 5) % 256).astype(np.uint8)


def recorded(size: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The textured frame of ``"HxW"`` and what openpi makes of it: float32 [32, 32, 3] in [-1, 1]."""
    height, width = map(int, size.split("x"))
    return textured_frame(height, width), _RECORDED[size].astype(np.float32) / 255 * 2 - 1


def packed(frames: Sequence[npt.NDArray[np.uint8]], size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """The extension's pixels and table, exactly as long as their contents."""
    from pi0_engine import _C

    most = [_C.packed_size(*frame.shape[:2], size) for frame in frames]
    pixels = np.full(sum(used for used, _ in most), 99, np.uint8)
    table = np.full(sum(used for _, used in most), -99, np.int32)
    used_bytes, used_ints = _C.pack_frames(frames, size, pixels, table)
    return pixels[:used_bytes].copy(), table[:used_ints].copy()


def into_patches(images: npt.NDArray[np.float32], patch: int) -> npt.NDArray[np.float32]:
    """[N, size, size, 3] -> [N, patches, patch * patch * 3], patches row-major, pixels row by row."""
    count, size = images.shape[:2]
    grid = size // patch
    tiles = images.reshape(count, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(count, grid**2, patch**2 * 3)

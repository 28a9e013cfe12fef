"""Packed camera frames to patches of pixels in [-1, 1].

``pi0_engine.images.pack`` packs frames of any size into two flat buffers: their bytes, and a table of int32 that says
how each is resampled (csrc/frame_table.h). All that depends on a camera's size is data, so a captured CUDA graph serves
every camera.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pi0_engine.kernels.registry import Cost, nbytes, op

#: Frames start at multiples of so many bytes.
FRAME_ALIGNMENT = 16
#: Weights of the resampling are integers; 2^22 is 1.
_ONE = 1 << 22


class FrameEntry(NamedTuple):
    """One frame's entry in the table, as csrc/frame_table.h defines it."""

    pixels: int  # where its bytes start, in units of FRAME_ALIGNMENT
    height: int
    width: int
    scaled_height: int
    scaled_width: int
    top: int
    left: int
    rows: int  # where its vertical axis starts in the table: first[length], then weights[terms, length]
    row_terms: int
    columns: int  # the same of its horizontal axis
    column_terms: int


_ENTRY_INTS = len(FrameEntry._fields)


def _frames_to_patches_cost(pixels: Tensor, table: Tensor, *, patches: Tensor) -> Cost:
    # Shrinking, a pixel counts in two windows of a row and a resampled one in two of a column, in 1 / scale as many.
    # The scale is data; without the second pass this is a lower bound.
    return Cost(2.0 * 2 * pixels.numel(), nbytes(pixels, table, patches))


@op(cost=_frames_to_patches_cost, cuda="frames_cuda", cpp="frames_cpp")
def frames_to_patches(pixels: Tensor, table: Tensor, *, patches: Tensor) -> None:
    """Scale packed frames to fit a square, centre them on black, map them to [-1, 1], cut them into patches.

    pixels uint8 [bytes] and table int32 [entries], both as ``pi0_engine.images.pack`` packed them (each may be longer);
    patches float32 [N, patches, p * p * 3], patches row-major, a patch's pixels row by row with the channel fastest.

    The resampling is that of openpi-client's ``image_tools.py``, which calls Pillow: along the rows, then along the
    columns, each pass rounded to a pixel. Every implementation gives the same bits.
    """
    count, size, patch = geometry(pixels, table, patches)
    images = patches.new_full((count, size, size, 3), -1.0)
    for frame, image in enumerate(images):
        entry = FrameEntry(*table[_ENTRY_INTS * frame : _ENTRY_INTS * (frame + 1)].tolist())
        begin = entry.pixels * FRAME_ALIGNMENT
        source = pixels[begin : begin + entry.height * entry.width * 3].view(entry.height, entry.width, 3)
        rows = _resampling(table, entry.rows, entry.row_terms, entry.height, entry.scaled_height)
        columns = _resampling(table, entry.columns, entry.column_terms, entry.width, entry.scaled_width)
        narrow = _to_pixel(torch.einsum("xw,hwc->hxc", columns, source.double()))
        scaled = _to_pixel(torch.einsum("yh,hxc->yxc", rows, narrow)).float()
        # A number here, unlike a tensor, would make CUDA multiply by 1 / 255.
        normalized = scaled / scaled.new_tensor(255.0) * 2.0 - 1.0
        image[entry.top : entry.top + entry.scaled_height, entry.left : entry.left + entry.scaled_width] = normalized
    grid = size // patch
    tiles = images.view(count, grid, patch, grid, patch, 3).permute(0, 1, 3, 2, 4, 5)
    patches.copy_(tiles.reshape(patches.shape))


def _resampling(table: Tensor, begin: int, terms: int, length: int, output: int) -> Tensor:
    """An axis as a matrix [output, length] of integers, in float64: it holds sums of them times pixels exactly."""
    first, weights = table[begin : begin + output * (1 + terms)].view(1 + terms, output).split([1, terms])
    index = first + torch.arange(terms, device=table.device)[:, None]
    return torch.zeros(length, output, dtype=torch.float64, device=table.device).scatter_(0, index, weights.double()).T


def _to_pixel(weighted: Tensor) -> Tensor:
    """Weighted sums, times 2^22 -> the nearest pixels, still in float64."""
    return ((weighted + _ONE // 2) / _ONE).floor().clamp(max=255)


def geometry(pixels: Tensor, table: Tensor, patches: Tensor) -> tuple[int, int, int]:
    """Number of frames, side of the square, side of a patch.

    Raises:
        ValueError: an argument of another dtype, shape, layout or device than the op takes.
    """
    expected = {"pixels": (torch.uint8, 1), "table": (torch.int32, 1), "patches": (torch.float32, 3)}
    for (name, (dtype, dims)), tensor in zip(expected.items(), (pixels, table, patches), strict=True):
        if tensor.dtype != dtype or tensor.dim() != dims:
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"frames_to_patches: {name} is {given}, expected {dtype} with {dims} dimensions")
        if not tensor.is_contiguous() or tensor.device != patches.device:
            given = f"on {tensor.device} with strides {tensor.stride()}"
            raise ValueError(f"frames_to_patches: {name} is {given}, expected contiguous on {patches.device}")
    count, cells, values = patches.shape
    grid, patch = math.isqrt(cells), math.isqrt(values // 3)
    if cells == 0 or values == 0 or grid**2 != cells or 3 * patch**2 != values:
        raise ValueError(f"frames_to_patches: patches is {[count, cells, values]}, expected [N, grid^2, patch^2 * 3]")
    if table.numel() < _ENTRY_INTS * count:
        raise ValueError(f"frames_to_patches: table has {table.numel()} entries, too few for {count} frames")
    return count, grid * patch, patch

"""Camera frames to 224 x 224 pixels: resized by the C++ extension and by Pillow, or packed for the device to resize.

Run: pytest benchmarks/bench_images.py
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pi0_engine.images.pack import FrameStaging, staging_size
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.kernels.registry import all_ops

FRAMES = [(224, 224), (480, 640), (720, 1280)]
every_size = pytest.mark.parametrize("size", FRAMES, ids=lambda size: f"{size[0]}x{size[1]}")


def noise(count: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@every_size
@pytest.mark.parametrize("implementation", ["cpp", "pillow"])
def test_one_frame(benchmark: Any, implementation: Literal["cpp", "pillow"], size: tuple[int, int]) -> None:
    """One thread each, into a buffer that is already there; verified against Pillow first."""
    (frame,) = noise(1, size)
    preprocess = FramePreprocessor(implementation, threads=1)
    out = np.empty((1, 224, 224, 3), np.float32)
    preprocess([frame], out=out)
    assert np.abs(out - FramePreprocessor("pillow")([frame])).max() <= 2 / 255 + 1e-6
    benchmark(preprocess, [frame], out=out)


@every_size
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "bgr"])
def test_packing(benchmark: Any, layout: str, count: int, size: tuple[int, int]) -> None:
    """What the host does when a GPU resizes: copy the bytes, and compute the weights anew for every call."""
    frames = list(noise(count, size) if layout == "contiguous" else noise(count, size)[..., ::-1])
    room = staging_size([size] * count)
    staging = FrameStaging(np.zeros(room.bytes, np.uint8), np.zeros(room.ints, np.int32))
    used = staging.pack(frames)
    assert np.array_equal(staging.pixels[used.bytes - frames[-1].size : used.bytes], frames[-1].ravel())
    benchmark(staging.pack, frames)


@every_size
@pytest.mark.parametrize("implementation", ["cpp", "torch"])
def test_packed_frame_to_patches(benchmark: Any, implementation: str, size: tuple[int, int]) -> None:
    """The op on a CPU, which is what checks the CUDA kernel; for speed there, resize_with_pad is the one."""
    room = staging_size([size])
    staging = FrameStaging(np.zeros(room.bytes, np.uint8), np.zeros(room.ints, np.int32))
    staging.pack(list(noise(1, size)))
    run = all_ops()["frames_to_patches"].load(implementation, None)
    patches = torch.full((1, 256, 588), torch.nan)
    benchmark(run, torch.from_numpy(staging.pixels), torch.from_numpy(staging.table), patches=patches)
    assert not patches.isnan().any()

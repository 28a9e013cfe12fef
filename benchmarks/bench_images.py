"""Resizing camera frames to 224 x 224: the C++ extension against Pillow. Run: pytest benchmarks/bench_images.py"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from pi0_engine.images import FramePreprocessor

FRAMES = [(224, 224), (480, 640), (720, 1280)]


@pytest.mark.parametrize("size", FRAMES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("implementation", ["cpp", "pillow"])
def test_one_frame(benchmark: Any, implementation: Literal["cpp", "pillow"], size: tuple[int, int]) -> None:
    """One thread each, into a buffer that is already there; verified against Pillow first."""
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    preprocess = FramePreprocessor(implementation, threads=1)
    out = np.empty((1, 224, 224, 3), np.float32)
    preprocess([frame], out=out)
    assert np.abs(out - FramePreprocessor("pillow")([frame])).max() <= 2 / 255 + 1e-6
    benchmark(preprocess, [frame], out=out)

"""Triton's prompt rows against their torch meaning."""

from __future__ import annotations

import pytest
import torch

from pi0_engine.kernels.gpu.configs import LaunchConfig
from tests.support.triton_ops import DTYPES, Problem, check_kernel, unset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [LaunchConfig(16, 64, 0, pdl=True), LaunchConfig(8, 128, 0)], ids=["16", "8"])
@pytest.mark.parametrize(
    ("start", "prompt", "rows", "width"),
    [
        (4, 1, 1, 64),
        (0, 5, 16, 40),  # no camera
        (3, 0, 7, 72),  # no prompt
        (512, 33, 33, 130),
        (9, 12, 48, 200),
    ],
)
def test_embed_prompt(start: int, prompt: int, rows: int, width: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    """Rows behind the prompt are zero, whatever the buffer holds there: NaN, and more rows than are asked for."""
    p = Problem("prompt", dtype)
    embedded = unset(rows + 3, width)
    embedded[:prompt] = p.randn(prompt, width, dtype=torch.float32)
    args = (embedded, start, torch.tensor([start + prompt], dtype=torch.int32))
    check_kernel("embed_prompt", config, args, {"out": p.unset_stream(rows, width)}, torch.float32)

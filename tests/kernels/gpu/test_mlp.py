"""Triton's whole MLP against its torch meaning. On a GPU it is one launch with a barrier, in the interpreter two."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pi0_engine.kernels.gpu.configs import LaunchConfig
from tests.support.triton_ops import DTYPES, TARGET, Problem, check_kernel, scratch, unset

#: Rows behind the last have no norm: what is computed of them overflows, and is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

UP = LaunchConfig(block_m=16, block_n=16, block_k=32, pdl=True)
UP_WIDE = LaunchConfig(block_m=64, block_n=64, block_k=16)
UP_TMA = LaunchConfig(block_m=32, block_n=32, block_k=16, tma=True)
DOWN = LaunchConfig(block_m=16, block_n=64, block_k=64)
DOWN_SPLIT = LaunchConfig(block_m=32, block_n=64, block_k=16, splits=3)
DOWN_EMPTY_PARTS = LaunchConfig(block_m=64, block_n=64, block_k=64, splits=8)

#: rows, width of the stream, hidden width, multiprocessors: fewer programs than tiles, so that each does several.
SIZES = [
    (1, 28, 44, 132, UP, DOWN_SPLIT),
    (7, 72, 100, 3, UP, DOWN_EMPTY_PARTS),
    (16, 64, 52, 2, UP_TMA, DOWN),
    (33, 130, 72, 5, UP_TMA, DOWN_SPLIT),
    (50, 48, 200, 132, UP_WIDE, DOWN_EMPTY_PARTS),
    (64, 72, 96, 1, UP_WIDE, DOWN),
    (65, 200, 136, 7, UP, DOWN_SPLIT),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize(("rows", "width", "hidden", "multiprocessors", "up", "down"), SIZES)
def test_rmsnorm_mlp_residual(
    rows: int,
    width: int,
    hidden: int,
    multiprocessors: int,
    up: LaunchConfig,
    down: LaunchConfig,
    adarms: bool,
    dtype: torch.dtype,
) -> None:
    p = Problem("mlp", dtype)
    scale, bias, gate, after = None, None, None, None
    if adarms:
        scale, after = p.vector(width, around=1.0), p.vector(width, around=1.0)
        bias, gate = p.vector(2 * hidden), p.vector(width)
    args = (p.weight(2 * hidden, width), p.weight(width, hidden), scale, bias, gate, after)
    outputs = {"hidden": unset(rows, hidden, dtype=dtype), "residual": p.stream(rows, width, scale)}
    target = dataclasses.replace(TARGET, multiprocessors=min(multiprocessors, TARGET.multiprocessors))
    check_kernel("rmsnorm_mlp_residual", {"mlp_up": up, "mlp_down": down}, args, outputs, dtype, target=target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "hidden", "multiprocessors", "up", "down"), [SIZES[1], SIZES[3], SIZES[5]])
def test_tokens_with_times_of_their_own(
    rows: int, width: int, hidden: int, multiprocessors: int, up: LaunchConfig, down: LaunchConfig, dtype: torch.dtype
) -> None:
    """Each row takes its own of two biases, gates and scales."""
    p = Problem("times", dtype)
    scales, after, index = p.table(width, around=1.0), p.table(width, around=1.0), p.time_index(rows)
    weights = p.weight(2 * hidden, width), p.weight(width, hidden)
    args = (*weights, scales, p.table(2 * hidden), p.table(width), after, index)
    outputs = {"hidden": unset(rows, hidden, dtype=dtype), "residual": p.stream(rows, width, scales[index])}
    target = dataclasses.replace(TARGET, multiprocessors=min(multiprocessors, TARGET.multiprocessors))
    check_kernel("rmsnorm_mlp_residual", {"mlp_up": up, "mlp_down": down}, args, outputs, dtype, target=target)


def test_fewer_parts_where_working_memory_ends() -> None:
    p, dtype = Problem("memory", torch.float32), torch.float32
    args = (p.weight(88, 100), p.weight(100, 44), None, None, None, None)
    for memory in (2 * 2 * 2 * 32 * 64, 2 * 2 * 32 * 64, 0):
        outputs = {"hidden": unset(40, 44), "residual": p.stream(40, 100)}
        configs = {"mlp_up": UP, "mlp_down": DOWN_SPLIT}
        check_kernel("rmsnorm_mlp_residual", configs, args, outputs, dtype, working_memory=scratch(memory))

"""Triton's linear layers against their torch meanings, at every kind of tail."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs, Rule
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.gpu.operands import describe, splits_that_fit
from pi0_engine.kernels.gpu.target import TARGETS
from pi0_engine.kernels.registry import all_ops
from pi0_engine.kernels.stream import Stream
from tests.support.triton_ops import DEVICE, DTYPES, INTERPRETED, TARGET, Problem, check_kernel, scratch, unset

#: Rows behind the last have no norm: what is computed of them overflows, and is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

#: One launch configuration per way through the kernel. 64 columns are the fewest that a stream is written in.
PLAIN = LaunchConfig(block_m=16, block_n=64, block_k=32, pdl=True)
SPLIT = LaunchConfig(block_m=32, block_n=64, block_k=16, splits=3)
EMPTY_PARTS = LaunchConfig(block_m=16, block_n=64, block_k=64, splits=5, pdl=True)
TMA = LaunchConfig(block_m=32, block_n=64, block_k=32, tma=True)
TMA_SPLIT = LaunchConfig(block_m=16, block_n=64, block_k=16, splits=2, tma=True, pdl=True)
LARGE = LaunchConfig(block_m=64, block_n=128, block_k=32)

#: rows, columns, products: one row, one less and one more than a tile, several tiles each way; K of 72 and 588 is no
#: multiple of any block, and rows of 36 float16 are no multiple of 16 bytes.
SHAPES = [
    (1, 64, 32, PLAIN),
    (7, 100, 72, SPLIT),
    (16, 36, 72, TMA),
    (33, 130, 36, EMPTY_PARTS),
    (33, 64, 36, TMA),
    (50, 72, 104, TMA_SPLIT),
    (64, 192, 72, LARGE),
    (65, 200, 72, EMPTY_PARTS),
    (65, 96, 48, LARGE),
]
every_shape = pytest.mark.parametrize(
    ("rows", "n", "k", "config"), SHAPES, ids=[f"{m}x{n}x{k}-{i}" for i, (m, n, k, _) in enumerate(SHAPES)]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@every_shape
def test_linear(rows: int, n: int, k: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    """Plain and silu output of any width of tile."""
    p = Problem("linear", dtype)
    activation = "silu" if rows % 2 else None
    args = (p.randn(rows, k), p.weight(n, k), p.vector(n), activation, None)
    narrow = dataclasses.replace(config, block_n=16 if n < 100 else 64)
    check_kernel("linear", narrow, args, {"out": unset(rows, n, dtype=dtype)}, dtype, operands_rounded=False)


@every_dtype
@every_shape
def test_linear_begins_a_stream(rows: int, n: int, k: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    """As the action tokens enter: float32 weights, the rounded copy in the engine's dtype, adaRMS scale or none."""
    p, f32 = Problem("begin", dtype), torch.float32
    scale = p.vector(n, around=1.0) if rows % 2 else None
    args = (p.randn(rows, k, dtype=f32), p.weight(n, k, f32), p.vector(n), None, scale)
    check_kernel("linear", config, args, {"out": p.unset_stream(rows, n)}, f32)


@every_dtype
@pytest.mark.parametrize("adarms", [False, True])
@every_shape
def test_linear_residual(rows: int, n: int, k: int, config: LaunchConfig, adarms: bool, dtype: torch.dtype) -> None:
    """adaRMS's gate and scale, or vision's bias and sums, or neither (the language model)."""
    p = Problem("residual", dtype)
    vision = not adarms and rows % 2 == 0
    bias = p.vector(n) if vision else None
    gate, scale = (p.vector(n), p.vector(n, around=1.0)) if adarms else (None, None)
    args = (p.randn(rows, k), p.weight(n, k), bias, gate, scale)
    residual = p.residual(rows, n, sums=vision)
    check_kernel("linear_residual", config, args, {"residual": residual}, dtype, operands_rounded=False)


@every_dtype
@every_shape
def test_layernorm_linear(rows: int, n: int, k: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    p = Problem("layernorm", dtype)
    weight = p.weight(n, k, torch.float32)
    weight = (weight - weight.mean(dim=1, keepdim=True)).to(dtype)
    args = (p.stream(rows, k, sums=True), weight, p.vector(n), "gelu" if rows % 2 else None)
    check_kernel("layernorm_linear", config, args, {"out": unset(rows, n, dtype=dtype)}, dtype)


@every_dtype
@every_shape
def test_layernorm_linear_begins_a_stream(rows: int, n: int, k: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    """The projector: image tokens at the head of the prefix."""
    p = Problem("projector", dtype)
    weight = p.weight(n, k, torch.float32)
    weight = (weight - weight.mean(dim=1, keepdim=True)).to(dtype)
    args = (p.stream(rows, k, sums=True), weight, p.vector(n), None)
    check_kernel("layernorm_linear", config, args, {"out": p.unset_stream(rows, n)}, dtype)


@every_dtype
@pytest.mark.parametrize(("images", "patches"), [(1, 9), (2, 16), (4, 17)])
@pytest.mark.parametrize("config", [PLAIN, SPLIT, TMA], ids=["plain", "split", "tma"])
def test_patch_embed(images: int, patches: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    """Each patch gets the position of its place in its image; pixels and weights are always float32."""
    p, f32, n, k = Problem("patches", dtype), torch.float32, 72, 588
    args = (p.randn(images * patches, k, dtype=f32), p.weight(n, k, f32), p.randn(patches, n, dtype=f32))
    check_kernel("patch_embed", config, args, {"out": p.unset_stream(images * patches, n, sums=True)}, f32)


@every_dtype
@pytest.mark.parametrize("actions", [7, 32])
@pytest.mark.parametrize(("rows", "k"), [(1, 48), (50, 200), (65, 72)])
@pytest.mark.parametrize("splits", [1, 4])
def test_rmsnorm_linear_euler(rows: int, k: int, actions: int, splits: int, dtype: torch.dtype) -> None:
    """float32 throughout, whatever the engine's dtype: the rounded copy is not read. Pulled by all, some or no rows."""
    p, f32 = Problem("euler", dtype), torch.float32
    stream = p.stream(rows, k)
    stream.rounded.fill_(torch.nan)
    previous, pulled = p.randn(rows, actions, dtype=f32), torch.linspace(1, 0, rows)
    config = LaunchConfig(block_m=16, block_n=16, block_k=32, splits=splits, tma=rows == 50)
    for weights, time in ((pulled, 1.0), (pulled, 0.25), (torch.zeros(rows), 0.5)):
        step_weight = math.inf if time == 1 else 3.5
        guide = (previous, weights, torch.tensor([2.0 if time == 1 else 9.0]), step_weight, time, -0.1)
        args = (stream, p.weight(actions, k, f32), p.vector(actions), *guide)
        check_kernel("rmsnorm_linear_euler", config, args, {"actions": p.randn(rows, actions, dtype=f32)}, f32)


@every_dtype
@pytest.mark.parametrize("actions", [7, 32])
@pytest.mark.parametrize(("rows", "k"), [(1, 48), (50, 200), (65, 72)])
@pytest.mark.parametrize("splits", [1, 4])
def test_rmsnorm_linear_second_order(rows: int, k: int, actions: int, splits: int, dtype: torch.dtype) -> None:
    """Two points from one product, by the rule of the Euler step; some rows are given, or none."""
    p, f32 = Problem("second order", dtype), torch.float32
    stream = p.stream(rows, k)
    stream.rounded.fill_(torch.nan)
    config = {"rmsnorm_linear_euler": LaunchConfig(block_m=16, block_n=16, block_k=32, splits=splits, tma=rows == 50)}
    for factors, index in (
        ((0.0, 0.5), None),
        ((1.0, 1.0), None),
        ((0.5, 1.0), p.time_index(rows)),
        ((1.0, 1.5), None),
    ):
        start = p.randn(rows, actions, dtype=f32)
        args = (stream, p.weight(actions, k, f32), p.vector(actions), start, *factors, index)
        outputs = {"base": unset(rows, actions), "actions": unset(rows, actions)}
        check_kernel("rmsnorm_linear_second_order", config, args, outputs, f32)


@pytest.mark.parametrize("start_is", ["base", "actions"])
def test_two_points_start_where_one_of_them_was(start_is: str) -> None:
    """In place, as in the flow loop: bit for bit what another tensor gives, and given rows stay as they are."""
    p, rows = Problem("in place", torch.float32), 33
    index, begin = p.time_index(rows).to(DEVICE), p.randn(rows, 7).to(DEVICE)
    x = Stream(**{name: part.to(DEVICE) for name, part in p.stream(rows, 72).tensors.items()})
    w, bias = p.weight(7, 72).to(DEVICE), p.vector(7).to(DEVICE)
    config = LaunchConfig(block_m=16, block_n=16, block_k=32, splits=3)
    rules = LaunchConfigs([Rule("rmsnorm_linear_euler", config, "")])
    launcher = Launcher(TARGET, rules, concurrent=not INTERPRETED)
    kernel = all_ops()["rmsnorm_linear_second_order"].load("triton", launcher)
    expected = {"base": torch.empty_like(begin), "actions": torch.empty_like(begin)}
    kernel(x, w, bias, begin, 0.5, 1.0, index, **expected, scratch=scratch())
    found = {"base": torch.empty_like(begin), "actions": torch.empty_like(begin)}
    found[start_is].copy_(begin)
    kernel(x, w, bias, found[start_is], 0.5, 1.0, index, **found, scratch=scratch())
    for name, point in found.items():
        assert torch.equal(point, expected[name])
        assert torch.equal(point[index == 1], begin[index == 1])
        assert (point[index == 0] != begin[index == 0]).any(dim=1).all()


@every_dtype
@pytest.mark.parametrize(("rows", "n", "k", "config"), [SHAPES[1], SHAPES[3], SHAPES[5], SHAPES[6]])
def test_tokens_with_times_of_their_own(rows: int, n: int, k: int, config: LaunchConfig, dtype: torch.dtype) -> None:
    """Each row takes its own of two gates and scales; the row behind the last stays untouched."""
    p, f32 = Problem("times", dtype), torch.float32
    gates, scales, index = p.table(n), p.table(n, around=1.0), p.time_index(rows)
    args = (p.randn(rows, k, dtype=f32), p.weight(n, k, f32), p.vector(n), None, scales, index)
    check_kernel("linear", config, args, {"out": p.unset_stream(rows, n)}, f32)
    for after in (scales, None):  # behind the last layer no scale follows
        args = (p.randn(rows, k), p.weight(n, k), None, gates, after, index)
        residual = p.residual(rows, n)
        check_kernel("linear_residual", config, args, {"residual": residual}, dtype, operands_rounded=False)


@pytest.mark.parametrize("splits", [1, 3])
def test_given_actions_stay_as_they_are(splits: int) -> None:
    p, rows = Problem("given", torch.float32), 33
    index, actions = p.time_index(rows), p.randn(rows, 7)
    guide = (p.randn(rows, 7), torch.linspace(1, 0, rows), torch.tensor([3.0]), 2.0, 0.5, -0.1)
    args = (p.stream(rows, 72), p.weight(7, 72), p.vector(7), *guide, index)
    config = LaunchConfig(block_m=16, block_n=16, block_k=32, splits=splits)
    check_kernel("rmsnorm_linear_euler", config, args, {"actions": actions}, torch.float32)
    # Bit for bit: the meaning leaves them alone, and check_kernel compares with it in relative L2 only.
    given = index.bool()
    kernel = all_ops()["rmsnorm_linear_euler"].load(
        "triton",
        Launcher(TARGET, LaunchConfigs([Rule("rmsnorm_linear_euler", config, "")]), concurrent=not INTERPRETED),
    )
    on_device = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in args[1:]]
    x = Stream(**{name: part.to(DEVICE) for name, part in args[0].tensors.items()})
    after = actions.to(DEVICE, copy=True)
    kernel(x, *on_device, actions=after, scratch=scratch())
    assert torch.equal(after.cpu()[given], actions[given]) and (after.cpu()[~given] != actions[~given]).any(dim=1).all()


def test_fewer_parts_where_working_memory_ends() -> None:
    """A batch so large that its partial tiles would not fit has enough programs without."""
    p, dtype = Problem("memory", torch.float32), torch.float32
    args = (p.randn(65, 96), p.weight(130, 96), None, None, None)
    tiles, tile = 5 * 3, 16 * 64
    for memory, splits in [(4 * tiles * tile, 4), (3 * tiles * tile - 1, 2), (tiles * tile - 1, 1), (0, 1)]:
        config = LaunchConfig(block_m=16, block_n=64, block_k=16, splits=4)
        working_memory = scratch(memory)
        assert splits_that_fit(config, tiles, tile, working_memory) == splits
        residual = p.residual(65, 130)
        check_kernel("linear_residual", config, args, {"residual": residual}, dtype, working_memory=working_memory)


@pytest.mark.parametrize(
    ("arch", "k", "dtype", "wanted"),
    [
        (90, 72, torch.float16, True),
        (90, 36, torch.float16, False),  # rows of 72 bytes
        (90, 36, torch.float32, True),
        (89, 72, torch.float16, False),  # no tensor memory accelerator
    ],
)
def test_descriptors_only_where_the_accelerator_takes_them(arch: int, k: int, dtype: torch.dtype, wanted: bool) -> None:
    launcher = Launcher(TARGETS[arch], LaunchConfigs([Rule("wanted", TMA, ""), Rule("unwanted", PLAIN, "")]))
    a, w = torch.zeros(5, k, dtype=dtype), torch.zeros(7, k, dtype=dtype)
    for op, expected in (("wanted", wanted), ("unwanted", False)):
        assert describe(a, w, launcher.config(op, rows=5, n=7, k=k))["TMA"] is expected

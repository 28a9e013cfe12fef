"""Triton's paired linear layers (queries and keys under RoPE, gate and up) against their torch meanings."""

from __future__ import annotations

import pytest
import torch

from pi0_engine.engine.plan import rope_table
from pi0_engine.kernels.gpu.configs import LaunchConfig
from tests.support.triton_ops import DTYPES, Problem, check_kernel, scratch, unset

#: Rows behind the last have no norm: what is computed of them overflows, and is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

PLAIN = LaunchConfig(block_m=16, block_n=16, block_k=32, pdl=True)
WIDE = LaunchConfig(block_m=64, block_n=64, block_k=16)
SPLIT = LaunchConfig(block_m=32, block_n=32, block_k=16, splits=3, pdl=True)
EMPTY_PARTS = LaunchConfig(block_m=32, block_n=32, block_k=64, splits=4)
TMA = LaunchConfig(block_m=32, block_n=16, block_k=32, tma=True)
TMA_SPLIT = LaunchConfig(block_m=32, block_n=64, block_k=32, splits=2, tma=True, pdl=True)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

#: rows, query heads, KV heads, head_dim, products, configuration. A tile of pairs lies within half a head, covers
#: several heads, or crosses from one into the next (head_dim 24, 72: halves of 12 and 36), where TMA must not be used.
HEADS = [
    (1, 8, 1, 16, 48, PLAIN),
    (7, 4, 2, 24, 72, SPLIT),
    (16, 2, 2, 32, 40, TMA),
    (33, 3, 3, 72, 36, WIDE),
    (50, 1, 1, 256, 48, TMA_SPLIT),
    (64, 4, 4, 24, 104, TMA),
    (65, 2, 1, 72, 72, EMPTY_PARTS),
]


@every_dtype
@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim", "k", "config"), HEADS)
def test_rmsnorm_qkv_rope(
    rows: int, heads: int, kv_heads: int, head_dim: int, k: int, config: LaunchConfig, adarms: bool, dtype: torch.dtype
) -> None:
    """Positions in any order; the last layer of the language model has no queries."""
    p = Problem("qkv", dtype)
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    has_queries = adarms or rows % 2 == 0
    n = 2 * kv_dim + (q_dim if has_queries else 0)
    scale, bias = (p.vector(k, around=1.0), p.vector(n)) if adarms else (None, None)
    positions = torch.randperm(100, generator=torch.Generator().manual_seed(rows))[:rows].int()
    args = (p.stream(rows, k, scale), p.weight(n, k), scale, bias, rope_table(100, head_dim), positions)
    q = unset(rows, q_dim, dtype=dtype) if has_queries else None
    k_and_v = {name: unset(rows, kv_dim, dtype=dtype) for name in "kv"}
    check_kernel("rmsnorm_qkv_rope", config, args, {"q": q, **k_and_v}, dtype)


@every_dtype
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim", "k", "config"), [HEADS[1], HEADS[3], HEADS[4]])
def test_tokens_with_times_of_their_own(
    rows: int, heads: int, kv_heads: int, head_dim: int, k: int, config: LaunchConfig, dtype: torch.dtype
) -> None:
    """Each row takes its own of two biases; its scale is in the rounded rows already."""
    p = Problem("times", dtype)
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    scales, biases, index = p.table(k, around=1.0), p.table(q_dim + 2 * kv_dim), p.time_index(rows)
    args = (p.stream(rows, k, scales[index]), p.weight(q_dim + 2 * kv_dim, k), scales, biases)
    outputs = {name: unset(rows, width, dtype=dtype) for name, width in (("q", q_dim), ("k", kv_dim), ("v", kv_dim))}
    positions = torch.arange(rows, dtype=torch.int32)
    check_kernel("rmsnorm_qkv_rope", config, (*args, rope_table(100, head_dim), positions, index), outputs, dtype)


@every_dtype
@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize(
    ("rows", "hidden", "k", "config"),
    [
        (1, 52, 36, PLAIN),
        (7, 100, 72, SPLIT),
        (16, 44, 40, TMA),  # half a tile of the up rows is read where the gate's end
        (33, 130, 72, EMPTY_PARTS),
        (50, 128, 104, TMA_SPLIT),
        (64, 96, 48, WIDE),
        (65, 72, 588, TMA),
    ],
)
def test_rmsnorm_geglu(rows: int, hidden: int, k: int, config: LaunchConfig, adarms: bool, dtype: torch.dtype) -> None:
    p = Problem("geglu", dtype)
    scale, bias = (p.vector(k, around=1.0), p.vector(2 * hidden)) if adarms else (None, None)
    args = (p.stream(rows, k, scale), p.weight(2 * hidden, k), scale, bias)
    check_kernel("rmsnorm_geglu", config, args, {"out": unset(rows, hidden, dtype=dtype)}, dtype)


def test_fewer_parts_where_working_memory_ends() -> None:
    """Both halves of a pair need room."""
    p, dtype = Problem("memory", torch.float32), torch.float32
    args = (p.stream(33, 72), p.weight(104, 72), None, None)
    for memory in (2 * 3 * 2 * 32 * 32, 2 * 3 * 2 * 32 * 32 - 1, 0):
        out = unset(33, 52)
        check_kernel("rmsnorm_geglu", SPLIT, args, {"out": out}, dtype, working_memory=scratch(memory))

"""Triton's attention against its torch meanings: images, prefix and suffix, at every kind of tail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pi0_engine.kernels.gpu.attention import head_parts
from pi0_engine.kernels.gpu.configs import LaunchConfig
from tests.support.models import rel_l2
from tests.support.op_checks import tf32
from tests.support.triton_ops import BOUND, DTYPES, Problem, check_kernel, scratch, unset

PLAIN = LaunchConfig(block_m=16, block_n=16, block_k=0, pdl=True)
LARGE = LaunchConfig(block_m=64, block_n=64, block_k=0, stages=2)
SPLIT = LaunchConfig(block_m=32, block_n=16, block_k=0, splits=3, pdl=True)
#: More parts than blocks of keys: most see none.
EMPTY_PARTS = LaunchConfig(block_m=32, block_n=32, block_k=0, splits=5, ahead_bytes=1 << 16)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def keys(p: Problem, batch: int, rows: int, width: int, lengths: list[int] | None) -> Tensor:
    """[B, rows, width], of which the rows behind ``lengths`` are large: one that counted would show."""
    out = p.randn(batch, rows, width)
    for row, length in enumerate(lengths or []):
        out[row, length:] = 300.0
    return out


def int32(values: list[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32)


@every_dtype
@pytest.mark.parametrize(
    ("images", "patches", "heads", "head_dim", "config"),
    [
        (1, 1, 2, 16, PLAIN),
        (2, 16, 3, 24, PLAIN),
        (3, 33, 2, 72, SPLIT),
        (4, 50, 1, 32, EMPTY_PARTS),
        (1, 65, 2, 72, LARGE),
        (1, 64, 1, 256, SPLIT),
        (2, 7, 1, 12, LARGE),  # as the small models of other tests have them
    ],
)
def test_vision_attention(
    images: int, patches: int, heads: int, head_dim: int, config: LaunchConfig, dtype: torch.dtype
) -> None:
    p, width = Problem("vision", dtype), heads * head_dim
    out = unset(images, patches, width, dtype=dtype)
    check_kernel("vision_attention", config, (p.randn(images, patches, 3 * width), heads), {"out": out}, dtype)


@every_dtype
@pytest.mark.parametrize(
    ("rows", "lengths", "group", "kv_heads", "head_dim", "config"),
    [
        (1, None, 1, 1, 32, PLAIN),
        (7, [1], 8, 1, 16, PLAIN),
        (16, [16, 3], 2, 2, 24, SPLIT),
        (33, [17, 1], 8, 1, 32, EMPTY_PARTS),
        (50, [49], 1, 2, 72, LARGE),
        (64, None, 2, 1, 256, SPLIT),
        (65, [33, 65], 8, 1, 32, LARGE),
        (65, [15], 2, 2, 16, EMPTY_PARTS),
    ],
)
def test_prefix_attention(
    rows: int,
    lengths: list[int] | None,
    group: int,
    kv_heads: int,
    head_dim: int,
    config: LaunchConfig,
    dtype: torch.dtype,
) -> None:
    """Queries behind the length are computed like the others: what they give is never read, but must be finite."""
    p, batch = Problem("prefix", dtype), len(lengths or [0])
    q = p.randn(batch, rows, group * kv_heads * head_dim)
    k, v = (keys(p, batch, rows, kv_heads * head_dim, lengths) for _ in "kv")
    out = unset(*q.shape, dtype=dtype)
    check_kernel("prefix_attention", config, (q, k, v, int32(lengths), head_dim), {"out": out}, dtype)


#: prefix rows, lengths (one per observation), samples, horizon, query heads per KV head, KV heads, head_dim.
SUFFIXES = [
    (1, None, 1, 1, 8, 1, 16, PLAIN),
    (7, [1, 7], 1, 5, 2, 1, 24, PLAIN),
    (33, [17], 3, 7, 8, 1, 32, SPLIT),
    (16, [5, 16, 11], 2, 16, 1, 2, 16, EMPTY_PARTS),
    (50, [50], 1, 33, 8, 1, 32, SPLIT),
    (65, [63, 2], 2, 10, 2, 1, 72, EMPTY_PARTS),
    (40, [33], 1, 50, 8, 1, 256, SPLIT),
    (64, None, 2, 64, 1, 1, 32, LARGE),
]


@every_dtype
@pytest.mark.parametrize("state", ["no state token", "state token", "state token asks as well"])
@pytest.mark.parametrize(
    ("prefix", "lengths", "samples", "horizon", "group", "kv_heads", "head_dim", "config"), SUFFIXES
)
def test_suffix_attention(
    prefix: int,
    lengths: list[int] | None,
    samples: int,
    horizon: int,
    group: int,
    kv_heads: int,
    head_dim: int,
    config: LaunchConfig,
    state: str,
    dtype: torch.dtype,
) -> None:
    """π0.5 has no state token; π0's is among the queries in the first flow step only. ``ahead`` changes no result."""
    p, batch = Problem("suffix", dtype), len(lengths or [0])
    chunks = batch * samples
    kv_rows = chunks * horizon + (0 if state.startswith("no") else batch)
    q_rows = kv_rows if state.endswith("asks as well") else chunks * horizon
    q = p.randn(q_rows, group * kv_heads * head_dim)
    prefix_k, prefix_v = (keys(p, batch, prefix, kv_heads * head_dim, lengths) for _ in "kv")
    suffix_k, suffix_v = (p.randn(kv_rows, kv_heads * head_dim) for _ in "kv")
    ahead = p.weight(300, 200)
    args = (q, prefix_k, prefix_v, suffix_k, suffix_v, int32(lengths), horizon, chunks, head_dim, ahead)
    check_kernel("suffix_attention", config, args, {"out": unset(*q.shape, dtype=dtype)}, dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 [n, hd] for q [n, hd] and k, v [m, hd]."""
    return torch.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1) @ v


def what_rounded_scores_do(q: Tensor, k: Tensor, v: Tensor) -> float:
    """The most, in relative L2, that the rounding of float32 scores may change the output of one head in float64.

    A score is a sum of hd products, scaled once and brought to base 2: whatever the order of its terms, it is off by at
    most delta = (hd + 2) u sum |q_i k_i| / sqrt(hd), with u = 2^-24 (Higham, Accuracy and Stability, section 3.1). To
    first order the output is then off by at most sum_j p_j delta_j |v_j - out|: nothing where one key takes all, much
    where two large scores are nearly equal.
    """
    head_dim = q.shape[-1]
    delta = (head_dim + 2) * 2.0**-24 * (q.abs() @ k.abs().T) / head_dim**0.5
    out = softmax_attention(q, k, v)
    weight = torch.softmax(q @ k.T / head_dim**0.5, dim=-1) * delta
    return float((weight[..., None] * (v - out[:, None]).abs()).sum(1).norm() / out.norm())


def large_scores(factor: float) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
    """q, k, v [1, 33, 64] of two heads; the same in float64 head by head, without the three keys that are hidden."""
    p = Problem("scores", torch.float32)
    given = [p.randn(1, 33, 64) * factor for _ in "qkv"]
    q, k, v = (x[0].double().unflatten(-1, (2, 32)).unbind(1) for x in given)
    return given, [(q[head], k[head][:30], v[head][:30]) for head in range(2)]


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_scores_of_any_size(factor: float) -> None:
    """Softmax neither overflows nor loses the largest: scores of several thousand, one key takes nearly all."""
    (q, k, v), heads = large_scores(factor)
    allowed = max(what_rounded_scores_do(*head) for head in heads)
    args, out = (q, k, v, int32([30]), 32), unset(1, 33, 64)
    check_kernel("prefix_attention", SPLIT, args, {"out": out}, torch.float32, allowed=allowed)


def test_the_allowance_for_large_scores_lets_no_mistake_pass() -> None:
    """float32 scores are within it (2.8e-6 of 2.7e-4); TF32's, a key too many and a key lost are not."""
    _, ((q, k, v), _) = large_scores(30.0)
    allowed, right = what_rounded_scores_do(q, k, v) + BOUND[torch.float32], softmax_attention(q, k, v)

    def error(wrong: Tensor) -> float:
        return rel_l2(wrong, right)

    assert 0 < error(softmax_attention(q.float(), k.float(), v.float())) <= allowed < 1e-3
    assert error(softmax_attention(tf32(q), tf32(k), v)) > allowed
    assert error(softmax_attention(q, torch.cat([k, 300.0 + 0 * k[:1]]), torch.cat([v, v[:1]]))) > allowed
    largest = (q @ k.T).max(dim=0).values.argmax()
    kept = torch.arange(len(k)) != largest
    assert error(softmax_attention(q, k[kept], v[kept])) > allowed


def test_no_prefix_at_all() -> None:
    """No camera and an empty prompt: actions see the state and each other."""
    p, dtype = Problem("alone", torch.float32), torch.float32
    q, suffix_k, suffix_v = p.randn(6, 64), p.randn(6, 32), p.randn(6, 32)
    prefix = keys(p, 1, 3, 32, [0])
    args = (q, prefix, prefix, suffix_k, suffix_v, int32([0]), 5, 1, 32, None)
    for config in (PLAIN, EMPTY_PARTS):
        check_kernel("suffix_attention", config, args, {"out": unset(6, 64)}, dtype)


def test_fewer_parts_where_working_memory_ends() -> None:
    p, dtype = Problem("memory", torch.float32), torch.float32
    q, k, v = p.randn(1, 33, 64), p.randn(1, 33, 32), p.randn(1, 33, 32)
    part = 3 * 32 * (32 + 2)
    for memory in (2 * part, 2 * part - 1, 0):
        out = unset(1, 33, 64)
        check_kernel(
            "prefix_attention", SPLIT, (q, k, v, None, 32), {"out": out}, dtype, working_memory=scratch(memory)
        )


def test_head_parts_cover_the_head() -> None:
    """Two powers of two of at least 16 columns, no more than the next power of two alone would be."""
    for head_dim in range(1, 513):
        main, tail = head_parts(head_dim)
        assert main + tail >= head_dim
        assert all(part & (part - 1) == 0 for part in (main, tail)) and main >= 16 and (tail == 0 or 16 <= tail < main)
        assert main + tail <= max(16, 1 << (head_dim - 1).bit_length())
    assert head_parts(72) == (64, 16) and head_parts(256) == (256, 0) and head_parts(24) == (32, 0)

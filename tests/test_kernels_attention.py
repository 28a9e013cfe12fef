"""Attention ops: meanings and costs. Expected values go head by head and query by query, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from op_checks import check, randn, unset
from pi0_engine.kernels.attention import prefix_attention, suffix_attention, vision_attention
from pi0_engine.kernels.registry import REGISTRY, Cost


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """q [n, heads * hd] against k, v [m, kv_heads * hd], all keys allowed -> float64 [n, heads * hd]."""
    head_dim = q.shape[-1] // heads
    out = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        own, theirs = slice(head * head_dim, (head + 1) * head_dim), slice(shared * head_dim, (shared + 1) * head_dim)
        logits = q[:, own].double() @ k[:, theirs].double().T / math.sqrt(head_dim)
        out.append(logits.softmax(-1) @ v[:, theirs].double())
    return torch.cat(out, dim=-1)


@pytest.mark.parametrize(("count", "tokens", "heads", "head_dim"), [(1, 1, 1, 2), (3, 5, 3, 6), (2, 17, 4, 24)])
def test_vision_attention(count: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    width = heads * head_dim
    qkv, out = randn(count, tokens, 3 * width, dtype=dtype), unset(count, tokens, width, dtype=dtype)
    vision_attention(qkv, heads, out=out)
    q, k, v = qkv.chunk(3, dim=-1)
    expected = [attend(q[n], k[n], v[n], heads, heads) for n in range(count)]
    check(out, torch.stack(expected), dtype)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [None, [5, 2]])
@pytest.mark.parametrize("queries", [5, 1])
def test_prefix_attention(kv_heads: int, lengths: list[int] | None, queries: int, dtype: torch.dtype) -> None:
    """The keys of a longer cache, of which only the first are valid."""
    heads, head_dim = 4, 6
    q, out = randn(2, queries, heads * head_dim, dtype=dtype), unset(2, queries, heads * head_dim, dtype=dtype)
    k, v = (randn(2, 7, kv_heads * head_dim, dtype=dtype)[:, :5] for _ in range(2))
    prefix_attention(q, k, v, None if lengths is None else torch.tensor(lengths), head_dim, out=out)
    valid = lengths or [5, 5]
    expected = [attend(q[b], k[b, :n], v[b, :n], heads, kv_heads) for b, n in enumerate(valid)]
    check(out, torch.stack(expected), dtype)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("lengths", [None, [5, 2]])
@pytest.mark.parametrize("samples", [1, 3])
def test_suffix_attention(kv_heads: int, lengths: list[int] | None, samples: int, dtype: torch.dtype) -> None:
    """Action tokens see the valid prefix of their own observation, and all actions of their own chunk, no other."""
    heads, head_dim, horizon, chunks = 4, 6, 3, 2 * samples
    q = randn(chunks, horizon, heads * head_dim, dtype=dtype)
    prefix_k, prefix_v = (randn(2, 5, kv_heads * head_dim, dtype=dtype) for _ in range(2))
    k, v = (randn(chunks, horizon, kv_heads * head_dim, dtype=dtype) for _ in range(2))
    out = unset(chunks, horizon, heads * head_dim, dtype=dtype)
    counts = None if lengths is None else torch.tensor(lengths)
    suffix_attention(q, prefix_k, prefix_v, k, v, counts, head_dim, out=out)
    expected = []
    for chunk in range(chunks):
        b = chunk // samples
        n = 5 if lengths is None else lengths[b]
        keys, values = torch.cat([prefix_k[b, :n], k[chunk]]), torch.cat([prefix_v[b, :n], v[chunk]])
        expected.append(attend(q[chunk], keys, values, heads, kv_heads))
    check(out, torch.stack(expected), dtype)


def test_costs() -> None:
    """Two products of 2 n m hd FLOP per head; every tensor crosses memory once."""
    bf16 = torch.bfloat16
    cost = REGISTRY["vision_attention"].cost(unset(2, 5, 36, dtype=bf16), 3, out=unset(2, 5, 12, dtype=bf16))
    assert cost == Cost(flops=2 * 3 * (2 * 2 * 5 * 5 * 4), bytes=2 * (2 * 5 * 36 + 2 * 5 * 12))

    q, kv = unset(2, 3, 24, dtype=bf16), unset(2, 7, 6, dtype=bf16)
    cost = REGISTRY["prefix_attention"].cost(q, kv, kv, None, 6, out=q)
    assert cost == Cost(flops=2 * 4 * (2 * 2 * 3 * 7 * 6), bytes=2 * (2 * 144 + 2 * 84))

    chunks, own = unset(4, 3, 24, dtype=bf16), unset(4, 3, 6, dtype=bf16)
    cost = REGISTRY["suffix_attention"].cost(chunks, kv, kv, own, own, None, 6, out=chunks)
    assert cost == Cost(flops=4 * 4 * (2 * 2 * 3 * 10 * 6), bytes=2 * (2 * 288 + 2 * 84 + 2 * 72))

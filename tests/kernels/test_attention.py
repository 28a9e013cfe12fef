"""Attention ops: meanings and costs. Expected values go head by head and query by query, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pi0_engine.kernels.attention import prefix_attention, suffix_attention, vision_attention
from pi0_engine.kernels.registry import REGISTRY, Cost
from tests.support.op_checks import SCRATCH, check, randn, unset


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
    vision_attention(qkv, heads, out=out, scratch=SCRATCH)
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
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    prefix_attention(q, k, v, counts, head_dim, out=out, scratch=SCRATCH)
    valid = lengths or [5, 5]
    expected = [attend(q[b], k[b, :n], v[b, :n], heads, kv_heads) for b, n in enumerate(valid)]
    check(out, torch.stack(expected), dtype)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [3, 5, 1]])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("state", ["none", "kept", "queried"])
def test_suffix_attention(kv_heads: int, lengths: list[int], samples: int, state: str, dtype: torch.dtype) -> None:
    """Query by query: which keys each token sees.

    An action sees the valid prefix of its own observation, the state token of its own observation (π0), and all actions
    of its own chunk; the state token sees the valid prefix of its observation and itself. It is among the queries in
    the first step ("queried"); afterwards only its keys and values are there ("kept").
    """
    heads, head_dim, horizon, batch = 4, 6, 3, len(lengths)
    chunks, width, kv_dim = batch * samples, heads * head_dim, kv_heads * head_dim
    actions = chunks * horizon
    rows = actions + (0 if state == "none" else batch)
    queries = rows if state == "queried" else actions
    q, out = randn(queries, width, dtype=dtype), unset(queries, width, dtype=dtype)
    prefix_k, prefix_v = (randn(batch, 7, kv_dim, dtype=dtype)[:, :5] for _ in range(2))
    k, v = (randn(rows, kv_dim, dtype=dtype) for _ in range(2))
    counts = None if set(lengths) == {5} else torch.tensor(lengths, dtype=torch.int32)
    arguments = (q, prefix_k, prefix_v, k, v, counts, horizon, chunks, head_dim)
    suffix_attention(*arguments, None, out=out, scratch=SCRATCH)

    def expected(row: int, observation: int, seen: list[int]) -> Tensor:
        n = lengths[observation]
        keys, values = torch.cat([prefix_k[observation, :n], k[seen]]), torch.cat([prefix_v[observation, :n], v[seen]])
        return attend(q[row : row + 1], keys, values, heads, kv_heads)

    for b in range(batch):
        states = [] if state == "none" else [actions + b]
        for chunk in range(b * samples, (b + 1) * samples):
            own = list(range(chunk * horizon, (chunk + 1) * horizon))
            for row in own:
                check(out[row : row + 1], expected(row, b, own + states), dtype)
        if state == "queried":
            check(out[actions + b : actions + b + 1], expected(actions + b, b, states), dtype)


def test_weights_that_are_read_later_change_nothing() -> None:
    """``ahead`` is only ever brought closer: NaN in it does no harm."""
    q, prefix, own = randn(7, 24), randn(1, 5, 6), randn(7, 6)
    results = []
    for ahead in (None, unset(40, 8)):
        results.append(unset(7, 24))
        arguments = (q, prefix, prefix, own, own, None, 6, 1, 6, ahead)
        suffix_attention(*arguments, out=results[-1], scratch=SCRATCH)
    assert torch.equal(*results)


def test_keys_behind_the_valid_ones_do_not_matter(dtype: torch.dtype) -> None:
    """Bit for bit, for prefix, actions and state."""
    q, own, lengths = randn(2 * 3 + 2, 24, dtype=dtype), randn(2 * 3 + 2, 6, dtype=dtype), torch.tensor([4, 1])
    prefix = randn(2, 5, 6, dtype=dtype)
    other = prefix.clone()
    other[0, 4:], other[1, 1:] = 1000, -1000
    seen = []
    for keys in (prefix, other):
        mixed, answer = unset(2, 5, 24, dtype=dtype), unset(8, 24, dtype=dtype)
        queries = q[:1].expand(2, 5, 24).contiguous()
        prefix_attention(queries, keys, keys, lengths, 6, out=mixed, scratch=SCRATCH)
        suffix_attention(q, keys, keys, own, own, lengths, 3, 2, 6, None, out=answer, scratch=SCRATCH)
        seen.append((mixed, answer))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_costs() -> None:
    """Two products of 2 n m hd FLOP per head; every tensor crosses memory once."""
    bf16 = torch.bfloat16
    qkv, out = unset(2, 5, 36, dtype=bf16), unset(2, 5, 12, dtype=bf16)
    cost = REGISTRY["vision_attention"].cost(qkv, 3, out=out, scratch=SCRATCH)
    assert cost == Cost(flops=2 * 3 * (2 * 2 * 5 * 5 * 4), bytes=2 * (2 * 5 * 36 + 2 * 5 * 12))

    q, kv = unset(2, 3, 24, dtype=bf16), unset(2, 7, 6, dtype=bf16)
    cost = REGISTRY["prefix_attention"].cost(q, kv, kv, None, 6, out=q, scratch=SCRATCH)
    assert cost == Cost(flops=2 * 4 * (2 * 2 * 3 * 7 * 6), bytes=2 * (2 * 144 + 2 * 84))


@pytest.mark.parametrize(
    ("rows", "queries", "pairs"),
    [
        (12, 12, 12 * (7 + 3)),  # four chunks of three actions of two observations, without state
        (14, 12, 12 * (7 + 3 + 1)),  # the state's keys are there
        (14, 14, 12 * (7 + 3 + 1) + 2 * (7 + 1)),  # the state tokens ask, too
    ],
)
def test_cost_of_suffix_attention(rows: int, queries: int, pairs: int) -> None:
    """Pairs of query and key, each 2 * 2 * 6 FLOP in 4 heads; ``ahead`` is read by another op."""
    bf16 = torch.bfloat16
    q, kv, own = unset(queries, 24, dtype=bf16), unset(2, 7, 6, dtype=bf16), unset(rows, 6, dtype=bf16)
    arguments = (q, kv, kv, own, own, None, 3, 4, 6, unset(9, 9))
    cost = REGISTRY["suffix_attention"].cost(*arguments, out=q, scratch=SCRATCH)
    assert cost == Cost(flops=4 * pairs * 2 * 2 * 6, bytes=2 * (2 * queries * 24 + 2 * 2 * 7 * 6 + 2 * rows * 6))

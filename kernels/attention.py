"""Attention: over a camera's patches, over the prefix, and from the suffix to prefix and suffix.

The blockwise-causal mask [images + prompt | state | actions] never appears as a tensor: each block attends to a
contiguous range of the key/value cache, so only the number of valid rows is left to say. ``lengths`` int [B] gives
it; None means that every row is valid. Rows behind the valid ones must be finite: their probability is 0, and 0 times
NaN is NaN. Queries are contiguous; keys and values may be a slice of a longer cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.kernels.gemm import arithmetic_dtype
from pi0_engine.kernels.registry import Cost, nbytes, op
from pi0_engine.kernels.stream import Scratch


def _vision_attention_cost(qkv: Tensor, num_heads: int, *, out: Tensor, scratch: Scratch) -> Cost:
    count, tokens, width = out.shape
    return Cost(4.0 * count * tokens * tokens * width, nbytes(qkv, out))


@op(cost=_vision_attention_cost, triton="gpu.attention", flash_attn="gpu.flash_attention")
def vision_attention(qkv: Tensor, num_heads: int, *, out: Tensor, scratch: Scratch) -> None:
    """Full attention within each image. qkv [N, patches, 3 * W] stacks q, k, v; out [N, patches, W]."""
    q, k, v = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(arithmetic_dtype(qkv)) for part in qkv.chunk(3, dim=-1)
    )
    out.copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _prefix_attention_cost(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, head_dim: int, *, out: Tensor, scratch: Scratch
) -> Cost:
    return Cost(4.0 * q.numel() * k.shape[1], nbytes(q, k, v, out))


@op(cost=_prefix_attention_cost, triton="gpu.attention", flash_attn="gpu.flash_attention")
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, head_dim: int, *, out: Tensor, scratch: Scratch
) -> None:
    """Every query sees the first ``lengths[b]`` keys. q, out [B, n, heads * hd]; k, v [B, m, kv_heads * hd]."""
    out.copy_(_grouped_attention(q, k, v, _length_mask(lengths, k.shape[1], 0), head_dim))


def _suffix_attention_cost(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    lengths: Tensor | None,
    horizon: int,
    chunks: int,
    head_dim: int,
    ahead: Tensor | None,
    *,
    out: Tensor,
    scratch: Scratch,
) -> Cost:
    state = int(suffix_k.shape[0] > chunks * horizon)
    prefix, width = prefix_k.shape[1], q.shape[1]
    pairs = chunks * horizon * (prefix + horizon + state) + (q.shape[0] - chunks * horizon) * (prefix + 1)
    return Cost(4.0 * pairs * width, nbytes(q, prefix_k, prefix_v, suffix_k, suffix_v, out))


@op(cost=_suffix_attention_cost, triton="gpu.attention")
def suffix_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    lengths: Tensor | None,
    horizon: int,
    chunks: int,
    head_dim: int,
    ahead: Tensor | None,
    *,
    out: Tensor,
    scratch: Scratch,
) -> None:
    """Action tokens see the valid prefix of their observation, its state token, and all actions of their own chunk.

    A state token sees the valid prefix and itself. prefix_k, prefix_v [B, m, kv_heads * hd] are shared by the chunks
    (samples) of an observation. suffix_k, suffix_v [rows, kv_heads * hd]: the ``horizon`` actions of each of the
    ``chunks``, then (π0) the B state tokens. q, out [rows or fewer, heads * hd]: the same rows, the state tokens only
    in the first flow step, because they do not change afterwards. ``ahead`` is a weight that is read after this op: a
    GPU whose memory would idle meanwhile may bring it closer.
    """
    batch, actions = prefix_k.shape[0], chunks * horizon
    samples = chunks // batch
    states_k, states_v = suffix_k[actions:], suffix_v[actions:]

    def keys(prefix: Tensor, states: Tensor, own: Tensor) -> Tensor:  # of each chunk
        shared = torch.cat([prefix, states.view(batch, -1, states.shape[1])], dim=1)
        return torch.cat([shared.repeat_interleave(samples, dim=0), own.unflatten(0, (chunks, horizon))], dim=1)

    k, v = keys(prefix_k, states_k, suffix_k[:actions]), keys(prefix_v, states_v, suffix_v[:actions])
    mask = _length_mask(lengths, prefix_k.shape[1], k.shape[1] - prefix_k.shape[1])
    mask = None if mask is None else mask.repeat_interleave(samples, dim=0)
    mixed = _grouped_attention(q[:actions].unflatten(0, (chunks, horizon)), k, v, mask, head_dim)
    out[:actions].copy_(mixed.flatten(0, 1))
    if q.shape[0] > actions:
        k, v = torch.cat([prefix_k, states_k[:, None]], dim=1), torch.cat([prefix_v, states_v[:, None]], dim=1)
        mask = _length_mask(lengths, prefix_k.shape[1], 1)
        out[actions:].copy_(_grouped_attention(q[actions:, None], k, v, mask, head_dim)[:, 0])


def _length_mask(lengths: Tensor | None, rows: int, always: int) -> Tensor | None:
    """Bool [B, rows + always]: the first ``lengths[b]`` of ``rows`` keys, and all ``always`` keys behind them."""
    if lengths is None:
        return None
    valid = torch.arange(rows, device=lengths.device) < lengths[:, None]
    return F.pad(valid, (0, always), value=True)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int) -> Tensor:
    """q [B, n, heads * hd] against k, v [B, m, kv_heads * hd], mask bool [B, m] -> [B, n, heads * hd].

    The query heads that share a KV head are folded into the rows of one matrix, so that its keys are read once.
    """
    dtype = arithmetic_dtype(q)
    batch, n, _ = q.shape
    kv_heads = k.shape[-1] // head_dim

    def rows(x: Tensor) -> Tensor:  # [B, m, kv_heads * hd] -> [B, kv_heads, m, hd]
        return x.unflatten(-1, (kv_heads, head_dim)).transpose(1, 2).to(dtype)

    folded = q.reshape(batch, n, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3).to(dtype)
    allowed = None if mask is None else mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(folded, rows(k), rows(v), attn_mask=allowed)
    return mixed.unflatten(2, (n, -1)).transpose(1, 2).flatten(2)

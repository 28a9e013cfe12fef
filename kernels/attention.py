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


def _vision_attention_cost(qkv: Tensor, num_heads: int, *, out: Tensor) -> Cost:
    count, tokens, width = out.shape
    return Cost(4.0 * count * tokens * tokens * width, nbytes(qkv, out))


@op(cost=_vision_attention_cost)
def vision_attention(qkv: Tensor, num_heads: int, *, out: Tensor) -> None:
    """Full attention within each image. qkv [N, patches, 3 * W] stacks q, k, v; out [N, patches, W]."""
    q, k, v = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(arithmetic_dtype(qkv)) for part in qkv.chunk(3, dim=-1)
    )
    out.copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _cache_attention_cost(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, head_dim: int, *, out: Tensor
) -> Cost:
    return Cost(4.0 * q.numel() * k.shape[1], nbytes(q, k, v, out))


@op(cost=_cache_attention_cost)
def prefix_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, head_dim: int, *, out: Tensor) -> None:
    """Every query sees the first ``lengths[b]`` keys. q, out [B, n, heads * hd]; k, v [B, m, kv_heads * hd]."""
    out.copy_(_grouped_attention(q, k, v, _length_mask(lengths, k.shape[1], 0), head_dim))


def _suffix_attention_cost(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    lengths: Tensor | None,
    head_dim: int,
    *,
    out: Tensor,
) -> Cost:
    keys = prefix_k.shape[1] + suffix_k.shape[1]
    return Cost(4.0 * q.numel() * keys, nbytes(q, prefix_k, prefix_v, suffix_k, suffix_v, out))


@op(cost=_suffix_attention_cost)
def suffix_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    lengths: Tensor | None,
    head_dim: int,
    *,
    out: Tensor,
) -> None:
    """Action tokens see the valid prefix of their observation and all actions of their own chunk.

    q, out [B * samples, H, heads * hd]; prefix_k, prefix_v [B, m, kv_heads * hd] shared by the samples of an
    observation; suffix_k, suffix_v [B * samples, H, kv_heads * hd].
    """
    samples = q.shape[0] // prefix_k.shape[0]
    k = torch.cat([prefix_k.repeat_interleave(samples, dim=0), suffix_k], dim=1)
    v = torch.cat([prefix_v.repeat_interleave(samples, dim=0), suffix_v], dim=1)
    mask = _length_mask(lengths, prefix_k.shape[1], suffix_k.shape[1])
    if mask is not None:
        mask = mask.repeat_interleave(samples, dim=0)
    out.copy_(_grouped_attention(q, k, v, mask, head_dim))


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

    folded = q.view(batch, n, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3).to(dtype)
    allowed = None if mask is None else mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(folded, rows(k), rows(v), attn_mask=allowed)
    return mixed.unflatten(2, (n, -1)).transpose(1, 2).flatten(2)

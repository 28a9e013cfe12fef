"""flash-attn as an implementation of vision and prefix attention: selectable, and a baseline in the benchmarks.

It allocates its result, which is then copied: inside a CUDA graph that comes from the graph's own memory.
"""

from __future__ import annotations

from torch import Tensor

from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.stream import Scratch


def vision_attention(launcher: Launcher, qkv: Tensor, num_heads: int, *, out: Tensor, scratch: Scratch) -> None:
    from flash_attn import flash_attn_qkvpacked_func

    out.copy_(flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, num_heads, -1))).flatten(2))


def prefix_attention(
    launcher: Launcher,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    head_dim: int,
    *,
    out: Tensor,
    scratch: Scratch,
) -> None:
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (tensor.unflatten(-1, (-1, head_dim)) for tensor in (q, k, v))
    # The lengths stay on the GPU, so that a graph serves every prompt.
    out.copy_(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths).flatten(2))

"""A norm and the linear layers that read it, as one op.

The norm's own weight is folded into the linear weight when the engine is built, so that only the row statistics are
left to do here: subtract the mean (LayerNorm) and divide by the root mean square. adaRMS (π0.5) has no constant
weight to fold; its ``scale`` and ``shift`` come in as vectors that depend on the flow step.

Shapes: x [..., n, K]; weight [N, K]; scale and shift [K] or None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.kernels.gemm import gemm
from pi0_engine.kernels.linear import gemm_flops
from pi0_engine.kernels.registry import Cost, nbytes, op

NORM_EPS = 1e-6


def rms_normalize(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x / rms(x), times scale, plus shift; float32. ``scale`` is already 1 + adaRMS's raw scale."""
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)
    if scale is None:
        return normed
    assert shift is not None
    return torch.addcmul(shift, normed, scale)


def _layernorm_linear_cost(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, *, out: Tensor) -> Cost:
    return Cost(gemm_flops(x, weight), nbytes(x, weight, bias, out))


@op(cost=_layernorm_linear_cost)
def layernorm_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, *, out: Tensor) -> None:
    """out [..., N] = activation(layernorm(x) @ weight^T + bias); activation None or "gelu" (tanh form)."""
    assert activation in (None, "gelu"), activation
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(weight.dtype)
    y = gemm(normed, weight, bias)
    out.copy_(F.gelu(y, approximate="tanh") if activation == "gelu" else y)


def _rmsnorm_qkv_rope_cost(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    rope_table: Tensor,
    positions: Tensor,
    *,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
) -> Cost:
    rows_of_table = positions.numel() * rope_table.shape[-1] * rope_table.element_size()
    return Cost(gemm_flops(x, weight), nbytes(x, weight, scale, shift, q, k, v) + rows_of_table)


@op(cost=_rmsnorm_qkv_rope_cost)
def rmsnorm_qkv_rope(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    rope_table: Tensor,
    positions: Tensor,
    *,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
) -> None:
    """Project a normed x [B, n, K] to queries, keys and values, rotate queries and keys, write keys and values.

    ``weight`` stacks the rows of q, k, v; for the language model's last layer, whose queries nobody reads, ``q`` is
    None and the weight holds only k and v. ``rope_table`` float32 [positions, head_dim] holds cosines, then sines, of
    each position; ``positions`` int [B, n]. Outputs q [B, n, heads * head_dim], k and v [B, n, kv_heads * head_dim].
    """
    normed = rms_normalize(x, scale, shift).to(weight.dtype)
    y = gemm(normed, weight)
    kv_dim = k.shape[-1]
    cos, sin = rope_table[positions].to(y.dtype).chunk(2, dim=-1)
    if q is not None:
        _rotate(y[..., : q.shape[-1]], cos, sin, q)
    _rotate(y[..., -2 * kv_dim : -kv_dim], cos, sin, k)
    v.copy_(y[..., -kv_dim:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """RoPE in half-split form on each head of x [B, n, heads * hd], with cos and sin [B, n, hd / 2]."""
    half = cos.shape[-1]
    x1, x2 = x.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
    y1, y2 = out.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
    cos, sin = cos[..., None, :], sin[..., None, :]
    y1.copy_(x1 * cos - x2 * sin)
    y2.copy_(x2 * cos + x1 * sin)


def _rmsnorm_geglu_cost(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *, out: Tensor) -> Cost:
    return Cost(gemm_flops(x, weight), nbytes(x, weight, scale, shift, out))


@op(cost=_rmsnorm_geglu_cost)
def rmsnorm_geglu(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *, out: Tensor) -> None:
    """out [..., F] = gelu_tanh(normed @ gate^T) * (normed @ up^T), where ``weight`` [2F, K] stacks gate, then up."""
    normed = rms_normalize(x, scale, shift).to(weight.dtype)
    gate, up = gemm(normed, weight).chunk(2, dim=-1)
    torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)


def _rmsnorm_linear_euler_cost(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, *, actions: Tensor
) -> Cost:
    return Cost(gemm_flops(x, weight), nbytes(x, weight, bias, scale, shift, actions, actions))


@op(cost=_rmsnorm_linear_euler_cost)
def rmsnorm_linear_euler(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, *, actions: Tensor
) -> None:
    """One Euler step: actions float32 [..., A] += normed @ weight [A, K]^T + bias, with dt folded into both."""
    actions.add_(gemm(rms_normalize(x, scale, shift).to(weight.dtype), weight, bias))

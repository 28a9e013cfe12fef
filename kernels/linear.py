"""Linear layers without a norm in front: plain, and added to the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pi0_engine.kernels.gemm import gemm
from pi0_engine.kernels.registry import Cost, nbytes, op


def gemm_flops(rows_of: Tensor, weight: Tensor) -> float:
    """2 M N K of ``rows_of`` [..., K] times ``weight`` [N, K]."""
    return 2.0 * (rows_of.numel() // rows_of.shape[-1]) * weight.shape[0] * weight.shape[1]


def _linear_cost(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, *, out: Tensor) -> Cost:
    return Cost(gemm_flops(x, weight), nbytes(x, weight, bias, out))


@op(cost=_linear_cost)
def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, *, out: Tensor) -> None:
    """out [..., N] = activation(x [..., K] @ weight [N, K]^T + bias [N]); activation None or "silu"."""
    assert activation in (None, "silu"), activation
    y = gemm(x, weight, bias)
    out.copy_(F.silu(y) if activation == "silu" else y)


def _linear_residual_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, *, residual: Tensor
) -> Cost:
    return Cost(gemm_flops(x, weight), nbytes(x, weight, bias, gate, residual, residual))


@op(cost=_linear_residual_cost)
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, *, residual: Tensor) -> None:
    """residual [..., N] += gate [N] * (x [..., K] @ weight [N, K]^T + bias [N]). ``gate`` is adaRMS's, or None."""
    y = gemm(x, weight, bias)
    residual.add_(y if gate is None else y * gate)

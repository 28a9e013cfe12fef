"""Linear layers without a norm in front: plain, at the start of a residual stream, and added to one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pi0_engine.kernels.gemm import gemm
from pi0_engine.kernels.registry import Cost, nbytes, op
from pi0_engine.kernels.stream import Scratch, Stream, of_rows


def gemm_flops(rows_of: Tensor, weight: Tensor) -> float:
    """2 M N K of ``rows_of`` [..., K] times ``weight`` [N, K]."""
    return 2.0 * (rows_of.numel() // rows_of.shape[-1]) * weight.shape[0] * weight.shape[1]


def stream_bytes(stream: Stream) -> int:
    """What writing every part of a stream moves."""
    return nbytes(*stream.tensors.values())


def output_bytes(out: Tensor | Stream) -> int:
    return stream_bytes(out) if isinstance(out, Stream) else nbytes(out)


def store(y: Tensor, out: Tensor | Stream, next_scale: Tensor | None = None) -> None:
    """``y`` as it is, or as the beginning of a residual stream."""
    if isinstance(out, Stream):
        out.write(y, next_scale)
    else:
        out.copy_(y)


def _linear_cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    out: Tensor | Stream,
    scratch: Scratch,
) -> Cost:
    return Cost(gemm_flops(x, weight), nbytes(x, weight, bias, next_scale, time_index) + output_bytes(out))


@op(cost=_linear_cost, triton="gpu.linear")
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    out: Tensor | Stream,
    scratch: Scratch,
) -> None:
    """out [rows, N] = activation(x [rows, K] @ weight [N, K]^T + bias [N]); activation None or "silu".

    ``out`` may begin a residual stream; ``next_scale`` float32 [N] is then the next norm's adaRMS scale, or None. With
    ``time_index`` int32 [rows] it is a table [2, N], and each row takes the entry that its index names.
    """
    assert activation in (None, "silu"), activation
    y = gemm(x, weight, bias)
    store(F.silu(y) if activation == "silu" else y, out, of_rows(next_scale, time_index))


def _linear_residual_cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    residual: Stream,
    scratch: Scratch,
) -> Cost:
    moved = nbytes(x, weight, bias, gate, next_scale, time_index, residual.x) + stream_bytes(residual)
    return Cost(gemm_flops(x, weight), moved)


@op(cost=_linear_residual_cost, triton="gpu.linear")
def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    residual: Stream,
    scratch: Scratch,
) -> None:
    """residual [rows, N] += gate [N] * (x [rows, K] @ weight [N, K]^T + bias [N]). ``gate`` is adaRMS's, or None.

    ``next_scale`` float32 [N] is the adaRMS scale of the norm that reads the stream next, or None. With ``time_index``
    int32 [rows] both are tables [2, N], and each row takes the entry that its index names.
    """
    y, gate = gemm(x, weight, bias), of_rows(gate, time_index)
    residual.write(residual.x + (y if gate is None else y * gate), of_rows(next_scale, time_index))

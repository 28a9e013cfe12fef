"""A norm and the linear layers that read it, as one op.

The norm's own weight is folded into the linear weight when the engine is built; LayerNorm's mean too, because a weight
row whose mean is subtracted does not see it. What is left is a factor per row: 1 / rms, or 1 / standard deviation.
adaRMS (π0.5) has no constant weight to fold: its ``scale`` [K] depends on the flow step, and its shift comes in as
``bias`` [N], already multiplied by the linear weight. Where each token has a flow time of its own, adaRMS's terms are
tables [2, ...] of the step's time and of time 0, and ``time_index`` int32 [rows] says which a row takes.

x is a :class:`~pi0_engine.kernels.stream.Stream` of [rows, K]. The meanings below read its float32 part and normalise
before they round; a GPU kernel multiplies the rounded part (which holds the scale already) and applies the factor to
the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.kernels.gemm import gemm
from pi0_engine.kernels.linear import gemm_flops, linear_residual, output_bytes, store, stream_bytes
from pi0_engine.kernels.registry import Cost, nbytes, op
from pi0_engine.kernels.stream import Scratch, Stream, of_rows

NORM_EPS = 1e-6


def rms_normalize(x: Tensor, scale: Tensor | None) -> Tensor:
    """x / rms(x), times scale; float32. ``scale`` is already 1 + adaRMS's raw scale."""
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)
    return normed if scale is None else normed * scale


def _product(x: Stream, weight: Tensor, scale: Tensor | None, bias: Tensor | None, time_index: Tensor | None) -> Tensor:
    """Rows behind their RMS norm, times ``weight`` [N, K] transposed, plus their bias: [rows, N]."""
    normed = rms_normalize(x.x, of_rows(scale, time_index)).to(weight.dtype)
    if bias is None or time_index is None:
        return gemm(normed, weight, bias)
    y = gemm(normed, weight)
    return y.float() + bias[time_index]  # rounded once more when it is stored, not here as well


def _read_bytes(x: Stream) -> int:
    return nbytes(x.rounded, x.square_sums, x.sums)


def _layernorm_linear_cost(
    x: Stream, weight: Tensor, bias: Tensor, activation: str | None, *, out: Tensor | Stream, scratch: Scratch
) -> Cost:
    return Cost(gemm_flops(x.x, weight), _read_bytes(x) + nbytes(weight, bias) + output_bytes(out))


@op(cost=_layernorm_linear_cost, triton="gpu.linear")
def layernorm_linear(
    x: Stream, weight: Tensor, bias: Tensor, activation: str | None, *, out: Tensor | Stream, scratch: Scratch
) -> None:
    """out [rows, N] = activation(layernorm(x) @ weight^T + bias); activation None or "gelu" (tanh form).

    Every row of ``weight`` [N, K] has mean 0. ``out`` may begin a residual stream.
    """
    assert activation in (None, "gelu"), activation
    normed = F.layer_norm(x.x, x.x.shape[-1:], eps=NORM_EPS).to(weight.dtype)
    y = gemm(normed, weight, bias)
    store(F.gelu(y, approximate="tanh") if activation == "gelu" else y, out)


def _rmsnorm_qkv_rope_cost(
    x: Stream,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rope_table: Tensor,
    positions: Tensor,
    time_index: Tensor | None = None,
    *,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    scratch: Scratch,
) -> Cost:
    rows_of_table = positions.numel() * rope_table.shape[-1] * rope_table.element_size()
    return Cost(gemm_flops(x.x, weight), _read_bytes(x) + nbytes(weight, bias, time_index, q, k, v) + rows_of_table)


@op(cost=_rmsnorm_qkv_rope_cost, triton="gpu.paired")
def rmsnorm_qkv_rope(
    x: Stream,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rope_table: Tensor,
    positions: Tensor,
    time_index: Tensor | None = None,
    *,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    scratch: Scratch,
) -> None:
    """Project a normed x to queries, keys and values, rotate queries and keys, write keys and values.

    ``weight`` stacks the rows of q, k, v; for the language model's last layer, whose queries nobody reads, ``q`` is
    None and the weight holds only k and v. ``rope_table`` float32 [positions, head_dim] holds cosines, then sines, of
    each position; ``positions`` int [rows]. Outputs q [rows, heads * head_dim], k and v [rows, kv_heads * head_dim].
    """
    y = _product(x, weight, scale, bias, time_index)
    kv_dim = k.shape[-1]
    cos, sin = rope_table[positions].to(y.dtype).chunk(2, dim=-1)
    if q is not None:
        _rotate(y[:, : q.shape[-1]], cos, sin, q)
    _rotate(y[:, -2 * kv_dim : -kv_dim], cos, sin, k)
    v.copy_(y[:, -kv_dim:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """RoPE in half-split form on each head of x [rows, heads * hd], with cos and sin [rows, hd / 2]."""
    half = cos.shape[-1]
    x1, x2 = x.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
    y1, y2 = out.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
    cos, sin = cos[:, None], sin[:, None]
    y1.copy_(x1 * cos - x2 * sin)
    y2.copy_(x2 * cos + x1 * sin)


def _rmsnorm_geglu_cost(
    x: Stream, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, out: Tensor, scratch: Scratch
) -> Cost:
    return Cost(gemm_flops(x.x, weight), _read_bytes(x) + nbytes(weight, bias, out))


@op(cost=_rmsnorm_geglu_cost, triton="gpu.paired")
def rmsnorm_geglu(
    x: Stream, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, out: Tensor, scratch: Scratch
) -> None:
    """out [rows, F] = gelu_tanh(normed @ gate^T) * (normed @ up^T), where ``weight`` [2F, K] stacks gate, then up."""
    _geglu(_product(x, weight, scale, bias, None), out)


def _geglu(both: Tensor, out: Tensor) -> None:
    gate, up = both.chunk(2, dim=-1)
    torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)


def _rmsnorm_mlp_residual_cost(
    gate_up: Tensor,
    down: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    hidden: Tensor,
    residual: Stream,
    scratch: Scratch,
) -> Cost:
    flops = gemm_flops(residual.x, gate_up) + gemm_flops(hidden, down)
    read = _read_bytes(residual) + nbytes(residual.x, gate_up, down, bias, gate, next_scale, time_index, hidden, hidden)
    return Cost(flops, read + stream_bytes(residual))


@op(cost=_rmsnorm_mlp_residual_cost, triton="gpu.mlp")
def rmsnorm_mlp_residual(
    gate_up: Tensor,
    down: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    hidden: Tensor,
    residual: Stream,
    scratch: Scratch,
) -> None:
    """residual += gate * (geglu(normed residual @ gate_up^T) @ down^T): a whole MLP, for few rows.

    ``hidden`` [rows, F] is working memory. Everything else as in ``rmsnorm_geglu`` and ``linear_residual``.
    """
    _geglu(_product(residual, gate_up, scale, bias, time_index), hidden)
    linear_residual(hidden, down, None, gate, next_scale, time_index, residual=residual, scratch=scratch)


def _rmsnorm_linear_euler_cost(
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    previous: Tensor,
    prefix_weights: Tensor,
    max_weight: Tensor,
    step_weight: float,
    time: float,
    dt: float,
    time_index: Tensor | None = None,
    *,
    actions: Tensor,
    scratch: Scratch,
) -> Cost:
    guide = nbytes(previous, prefix_weights, max_weight, time_index)
    return Cost(gemm_flops(x.x, weight), nbytes(x.x, x.square_sums, weight, bias, actions, actions) + guide)


@op(cost=_rmsnorm_linear_euler_cost, triton="gpu.linear")
def rmsnorm_linear_euler(
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    previous: Tensor,
    prefix_weights: Tensor,
    max_weight: Tensor,
    step_weight: float,
    time: float,
    dt: float,
    time_index: Tensor | None = None,
    *,
    actions: Tensor,
    scratch: Scratch,
) -> None:
    """One Euler step: actions float32 [rows, A] += y - g (time y + dt (previous - actions)).

    y = normed @ weight [A, K]^T + bias is dt times the velocity: dt is folded into both, the final norm's scale into
    ``weight``, its shift into ``bias``. All of it is float32: this is the path by which the actions' precision leaves
    the network.

    g = min(step_weight, max_weight) * prefix_weights pulls a row towards ``previous`` float32 [rows, A] (docs/rtc.md);
    ``prefix_weights`` float32 [rows] and ``max_weight`` float32 [1] are data, so that a captured graph serves every
    chunk. Where g is 0 the step is the plain one, bit for bit; ``previous`` must be finite even there.

    A row whose ``time_index`` int32 [rows] is not 0 is given, and stays as it is.
    """
    y = gemm(rms_normalize(x.x, None).to(weight.dtype), weight, bias)
    g = (max_weight.clamp(max=step_weight) * prefix_weights)[:, None]
    step = y - g * (time * y + dt * (previous - actions))
    actions.add_(_where_not_given(step, time_index))


def _where_not_given(step: Tensor, time_index: Tensor | None) -> Tensor:
    """``step`` [rows, A], and 0 in the rows that are given."""
    return step if time_index is None else step.masked_fill((time_index != 0)[:, None], 0.0)


def _rmsnorm_linear_second_order_cost(
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    start: Tensor,
    base_factor: float,
    actions_factor: float,
    time_index: Tensor | None = None,
    *,
    base: Tensor,
    actions: Tensor,
    scratch: Scratch,
) -> Cost:
    moved = nbytes(x.x, x.square_sums, weight, bias, start, time_index, base, actions)
    return Cost(gemm_flops(x.x, weight), moved)


@op(cost=_rmsnorm_linear_second_order_cost, triton="gpu.linear")
def rmsnorm_linear_second_order(
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    start: Tensor,
    base_factor: float,
    actions_factor: float,
    time_index: Tensor | None = None,
    *,
    base: Tensor,
    actions: Tensor,
    scratch: Scratch,
) -> None:
    """A call of a solver of second order: base = start + base_factor y, actions = start + actions_factor y.

    y is dt times the velocity, as in ``rmsnorm_linear_euler``; what the factors are is in ``engine/solvers.py``.
    ``start``, ``base`` and ``actions`` are float32 [rows, A]; start may be one of the two others. A row whose
    ``time_index`` int32 [rows] is not 0 is given: there both are start.
    """
    y = _where_not_given(gemm(rms_normalize(x.x, None).to(weight.dtype), weight, bias), time_index)
    moved = start + actions_factor * y  # before base is written, which start may be
    base.copy_(start + base_factor * y)
    actions.copy_(moved)

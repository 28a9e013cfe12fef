"""Norm and linear as one op: meanings and costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pi0_engine.engine.plan import rope_table
from pi0_engine.kernels.norm_linear import (
    layernorm_linear,
    rmsnorm_geglu,
    rmsnorm_linear_euler,
    rmsnorm_linear_second_order,
    rmsnorm_mlp_residual,
    rmsnorm_qkv_rope,
)
from pi0_engine.kernels.registry import REGISTRY, Cost
from pi0_engine.kernels.stream import Stream
from tests.support.op_checks import (
    SCRATCH,
    check,
    check_stream,
    layer_norm,
    randn,
    rms_norm,
    stream,
    unset,
    unset_stream,
    weight,
)

BF16 = torch.bfloat16


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def centred(w: Tensor) -> Tensor:
    """Rows of mean 0, as the engine packs the weights behind a LayerNorm."""
    return (w.double() - w.double().mean(dim=1, keepdim=True)).to(w.dtype)


def modulation(adarms: bool, width: int, out_features: int) -> tuple[Tensor | None, Tensor | None]:
    """adaRMS's scale, and a bias that stands for its shift behind the linear layer."""
    return (1 + 0.3 * randn(width), 0.3 * randn(out_features)) if adarms else (None, None)


def no_pull(rows: int, actions: int) -> tuple[Any, ...]:
    """Arguments of an Euler step that continues nothing."""
    return torch.zeros(rows, actions), torch.zeros(rows), torch.ones(1), 1.0, 0.5, -0.1


def product(x: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """float64, of rows behind their RMS norm."""
    y = rms_norm(x, scale) @ w.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("width", [13, 150])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_layernorm_linear(width: int, activation: str | None, dtype: torch.dtype) -> None:
    x, w, bias = 3 + 5 * randn(10, width), centred(weight(7, width, dtype)), randn(7)
    out = unset(10, 7, dtype=dtype)
    layernorm_linear(stream(x, dtype, sums=True), w, bias, activation, out=out, scratch=SCRATCH)
    y = layer_norm(x) @ w.double().T + bias.double()
    check(out, gelu_tanh(y) if activation else y, dtype)


def test_layernorm_with_centred_weights_is_that_with_the_original_ones() -> None:
    x, original, bias, out = 3 + 5 * randn(10, 150), weight(7, 150), randn(7), unset(10, 7)
    layernorm_linear(stream(x, torch.float32, sums=True), centred(original), bias, None, out=out, scratch=SCRATCH)
    check(out, layer_norm(x) @ original.double().T + bias.double(), torch.float32)


def test_layernorm_linear_begins_a_stream(dtype: torch.dtype) -> None:
    """As the projector does: rows of another stream."""
    x, w, bias, whole = 3 + 5 * randn(10, 13), centred(weight(150, 13, dtype)), randn(150), unset_stream(12, 150, dtype)
    layernorm_linear(stream(x, dtype, sums=True), w, bias, None, out=whole[:10], scratch=SCRATCH)
    check_stream(whole[:10], layer_norm(x) @ w.double().T + bias.double(), None, dtype)
    assert all(part[10:].isnan().all() for part in whole.tensors.values())


def test_an_unknown_activation_is_refused() -> None:
    x = stream(randn(1, 2), torch.float32, sums=True)
    with pytest.raises(AssertionError):
        layernorm_linear(x, weight(2, 2), randn(2), "silu", out=unset(1, 2), scratch=SCRATCH)


def test_norms_have_eps_1e_6() -> None:
    """At values of 1e-3 eps is as large as the mean square."""
    x, expected = torch.tensor([[1e-3, -1e-3]]), torch.tensor([[0.5**0.5, -(0.5**0.5)]])
    out, actions = unset(1, 2), torch.zeros(1, 2)
    # The rows of this weight have mean 0: half of the difference of the two columns.
    halves = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    layernorm_linear(stream(x, torch.float32, sums=True), halves, torch.zeros(2), None, out=out, scratch=SCRATCH)
    torch.testing.assert_close(out, expected)
    rmsnorm_linear_euler(
        stream(x, torch.float32), torch.eye(2), torch.zeros(2), *no_pull(1, 2), actions=actions, scratch=SCRATCH
    )
    torch.testing.assert_close(actions, expected)
    # rmsnorm_geglu of (a, b): gelu(a) * b.
    hidden = unset(1, 1)
    rmsnorm_geglu(stream(x, torch.float32), torch.eye(2), None, None, out=hidden, scratch=SCRATCH)
    torch.testing.assert_close(hidden.double(), (gelu_tanh(expected[:, :1]) * expected[:, 1:]).double())


@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("width", [13, 150])
def test_rmsnorm_qkv_rope(adarms: bool, kv_heads: int, with_queries: bool, width: int, dtype: torch.dtype) -> None:
    """Four query heads of 6; keys and values go into the middle of a longer cache."""
    heads, head_dim, positions = 4, 6, torch.tensor([4, 5, 6, 0, 7, 8], dtype=torch.int32)
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    w = weight((q_dim if with_queries else 0) + 2 * kv_dim, width, dtype)
    x, (scale, bias) = randn(6, width), modulation(adarms, width, w.shape[0])
    q = unset(6, q_dim, dtype=dtype) if with_queries else None
    cache_k, cache_v = unset(8, kv_dim, dtype=dtype), unset(8, kv_dim, dtype=dtype)
    rmsnorm_qkv_rope(
        stream(x, dtype, scale=scale),
        w,
        scale,
        bias,
        rope_table(9, head_dim),
        positions,
        q=q,
        k=cache_k[1:7],
        v=cache_v[1:7],
        scratch=SCRATCH,
    )
    y = product(x, w, scale, bias)
    if q is not None:
        check(q, rotated(y[:, :q_dim], positions, head_dim), dtype)
    check(cache_k[1:7], rotated(y[:, -2 * kv_dim : -kv_dim], positions, head_dim), dtype)
    check(cache_v[1:7], y[:, -kv_dim:], dtype)
    assert cache_k[[0, 7]].isnan().all() and cache_v[[0, 7]].isnan().all()


def rotated(x: Tensor, positions: Tensor, head_dim: int) -> Tensor:
    """Pair (i, i + head_dim / 2) of each head as a complex number, times exp(i * position / 10000^(2i / head_dim))."""
    first, second = x.unflatten(-1, (-1, 2, head_dim // 2)).unbind(-2)
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turned = torch.complex(first, second) * torch.exp(1j * positions[:, None, None] * frequency)
    return torch.stack([turned.real, turned.imag], dim=-2).flatten(1)


@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize("width", [13, 150])
def test_rmsnorm_geglu(adarms: bool, width: int, dtype: torch.dtype) -> None:
    x, w, (scale, bias) = randn(10, width), weight(14, width, dtype), modulation(adarms, width, 14)
    out = unset(10, 7, dtype=dtype)
    rmsnorm_geglu(stream(x, dtype, scale=scale), w, scale, bias, out=out, scratch=SCRATCH)
    gate, up = product(x, w, scale, bias).chunk(2, dim=-1)
    check(out, gelu_tanh(gate) * up, dtype)


@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize("last_layer", [False, True])
@pytest.mark.parametrize("width", [13, 150])
def test_rmsnorm_mlp_residual(adarms: bool, last_layer: bool, width: int, dtype: torch.dtype) -> None:
    """The whole MLP: x + gate * (down @ (gelu(gate half) * up half)); behind the last layer no scale follows."""
    x, gate_up, down = randn(10, width), weight(14, width, dtype), weight(width, 7, dtype)
    scale, bias = modulation(adarms, width, 14)
    gate = randn(width) if adarms else None
    next_scale = 1 + 0.3 * randn(width) if adarms and not last_layer else None
    residual, hidden = stream(x, dtype, scale=scale), unset(10, 7, dtype=dtype)
    rmsnorm_mlp_residual(
        gate_up, down, scale, bias, gate, next_scale, hidden=hidden, residual=residual, scratch=SCRATCH
    )
    first, second = product(x, gate_up, scale, bias).chunk(2, dim=-1)
    branch = gelu_tanh(first) * second @ down.double().T
    expected = x.double() + (branch if gate is None else gate.double() * branch)
    check_stream(residual, expected, next_scale, dtype)


def test_rmsnorm_linear_euler() -> None:
    """Always float32: this is the path by which the actions' precision leaves the network."""
    for width in (13, 150):
        x, w, bias, actions = randn(10, width), weight(7, width), randn(7), randn(10, 7)
        expected = actions.double() + product(x, w, None, bias)
        rmsnorm_linear_euler(stream(x, BF16), w, bias, *no_pull(10, 7), actions=actions, scratch=SCRATCH)
        check(actions, expected, torch.float32)


@pytest.mark.parametrize(("step_weight", "max_weight", "bound"), [(math.inf, 3.0, 3.0), (2.5, 3.0, 2.5)])
def test_rmsnorm_linear_euler_is_pulled(step_weight: float, max_weight: float, bound: float) -> None:
    """x + dt (v - w W (previous - (x - t v))) with the velocity v; nothing is pulled where W is 0, bit for bit."""
    x, w, bias, actions, time, dt = randn(10, 13), weight(7, 13), randn(7), randn(10, 7), 0.75, -0.125
    previous, pull = randn(10, 7), torch.tensor([1, 1, 0.5, 0.25, 0, 0, 0, 0, 0, 0])
    velocity, before = product(x, w, None, bias) / dt, actions.double()
    correction = bound * pull.double()[:, None] * (previous.double() - (before - time * velocity))
    plain = actions.clone()
    rmsnorm_linear_euler(stream(x, BF16), w, bias, *no_pull(10, 7), actions=plain, scratch=SCRATCH)
    guide = (previous, pull, torch.tensor([max_weight]), step_weight, time, dt)
    rmsnorm_linear_euler(stream(x, BF16), w, bias, *guide, actions=actions, scratch=SCRATCH)
    check(actions, before + dt * (velocity - correction), torch.float32)
    assert torch.equal(actions[4:], plain[4:]) and (actions[:4] != plain[:4]).all()


@pytest.mark.parametrize("width", [13, 150])
def test_rows_take_their_own_of_two_modulations(width: int, dtype: torch.dtype) -> None:
    """Tokens with flow times of their own are what they would be in a chunk that is at their time altogether."""
    rows, index = 6, torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.int32)
    x, scales, gates, after = randn(rows, width), 1 + 0.3 * randn(2, width), randn(2, width), 1 + 0.3 * randn(2, width)
    qkv, gate_up, down = weight(18, width, dtype), weight(14, width, dtype), weight(width, 7, dtype)
    qkv_biases, biases, table, positions = randn(2, 18), randn(2, 14), rope_table(9, 6), torch.arange(6).int()

    def run(which: Tensor | None, entry: Any) -> tuple[list[Tensor], Stream]:
        read = scales[entry] if which is None else scales[which]
        q, k, v, hidden = (unset(rows, width, dtype=dtype) for width in (6, 6, 6, 7))
        residual = stream(x, dtype, scale=read)
        arguments = (qkv, scales[entry], qkv_biases[entry], table, positions, which)
        rmsnorm_qkv_rope(residual, *arguments, q=q, k=k, v=v, scratch=SCRATCH)
        modulation = (scales[entry], biases[entry], gates[entry], after[entry], which)
        rmsnorm_mlp_residual(gate_up, down, *modulation, hidden=hidden, residual=residual, scratch=SCRATCH)
        return [q, k, v, hidden], residual

    found, stream_found = run(index, [0, 1])
    for entry in (0, 1):
        mine = index == entry
        # The same arithmetic with one time for all: the very same bits.
        same, stream_same = run(index, [entry, entry])
        pairs = zip([*found, stream_found.x], [*same, stream_same.x], strict=True)
        assert all(torch.equal(actual[mine], wanted[mine]) for actual, wanted in pairs)
        if dtype == torch.float32:  # without a table the bias is added inside the product, rounded at another place
            plain, stream_plain = run(None, entry)
            for actual, wanted in zip([*found, stream_found.x], [*plain, stream_plain.x], strict=True):
                check(actual[mine], wanted[mine].double(), dtype)
                check(stream_found.rounded[mine], stream_plain.rounded[mine].double(), dtype)


def test_given_actions_stay_as_they_are() -> None:
    x, w, bias, actions = randn(6, 13), weight(7, 13), randn(7), randn(6, 7)
    index, before, plain = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.int32), actions.clone(), actions.clone()
    rmsnorm_linear_euler(stream(x, BF16), w, bias, *no_pull(6, 7), index, actions=actions, scratch=SCRATCH)
    rmsnorm_linear_euler(stream(x, BF16), w, bias, *no_pull(6, 7), actions=plain, scratch=SCRATCH)
    assert torch.equal(actions[index == 1], before[index == 1]) and torch.equal(actions[index == 0], plain[index == 0])


@pytest.mark.parametrize("start_is", ["another", "base", "actions"])
@pytest.mark.parametrize("factors", [(0.0, 0.5), (1.0, 1.5)])
def test_rmsnorm_linear_second_order(factors: tuple[float, float], start_is: str, dtype: torch.dtype) -> None:
    """Both points move on from where start was, whichever tensor it is in; the rounded copy is not read."""
    x, w, bias, begin = randn(10, 13), weight(7, 13), randn(7), randn(10, 7)
    base, actions = unset(10, 7), unset(10, 7)
    start = {"another": begin.clone(), "base": base, "actions": actions}[start_is]
    start.copy_(begin)
    rows = stream(x, dtype)
    rows.rounded.fill_(torch.nan)
    rmsnorm_linear_second_order(rows, w, bias, start, *factors, base=base, actions=actions, scratch=SCRATCH)
    y = rms_norm(x) @ w.double().T + bias.double()
    check(base, begin.double() + factors[0] * y, torch.float32)
    check(actions, begin.double() + factors[1] * y, torch.float32)


def test_given_actions_stay_as_they_are_in_both_points() -> None:
    x, w, bias, begin = randn(6, 13), weight(7, 13), randn(7), randn(6, 7)
    index, base = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.int32), unset(6, 7)
    actions = begin.clone()
    arguments = (stream(x, BF16), w, bias, actions, 0.5, 1.0, index)
    rmsnorm_linear_second_order(*arguments, base=base, actions=actions, scratch=SCRATCH)
    y = rms_norm(x) @ w.double().T + bias.double()
    for point, factor in ((base, 0.5), (actions, 1.0)):
        assert torch.equal(point[index == 1], begin[index == 1])
        check(point[index == 0], (begin.double() + factor * y)[index == 0], torch.float32)


def test_costs() -> None:
    """Six rows of width 8; bfloat16 weights, outputs and rounded rows; float32 sums, vectors and table."""
    x, scale, bias = stream(randn(6, 8), BF16), randn(8), randn(16)
    normed = 2 * 6 * 8 + 4 * 6  # the rounded rows and one sum of squares each

    with_sums = stream(randn(6, 8), BF16, sums=True)
    out = unset(6, 5, dtype=BF16)
    cost = REGISTRY["layernorm_linear"].cost(with_sums, weight(5, 8, BF16), randn(5), "gelu", out=out, scratch=SCRATCH)
    assert cost == Cost(flops=2 * 6 * 5 * 8, bytes=normed + 4 * 6 + 2 * 5 * 8 + 4 * 5 + 2 * 6 * 5)
    begun = unset_stream(6, 5, BF16)
    cost = REGISTRY["layernorm_linear"].cost(with_sums, weight(5, 8, BF16), randn(5), None, out=begun, scratch=SCRATCH)
    stream_of_5 = 4 * 6 * 5 + 2 * 6 * 5 + 4 * 6
    assert cost == Cost(flops=2 * 6 * 5 * 8, bytes=normed + 4 * 6 + 2 * 5 * 8 + 4 * 5 + stream_of_5)

    q, kv = unset(6, 8, dtype=BF16), unset(6, 4, dtype=BF16)
    positions, table = torch.zeros(6, dtype=torch.int32), rope_table(9, 4)
    arguments = (x, weight(16, 8, BF16), scale, bias, table, positions)
    cost = REGISTRY["rmsnorm_qkv_rope"].cost(*arguments, q=q, k=kv, v=kv, scratch=SCRATCH)
    rows_of_table = 6 * 4 * 4
    assert cost == Cost(2 * 6 * 16 * 8, normed + 2 * 16 * 8 + 4 * 16 + 2 * 6 * 16 + rows_of_table)
    arguments = (x, weight(8, 8, BF16), None, None, table, positions)
    cost = REGISTRY["rmsnorm_qkv_rope"].cost(*arguments, q=None, k=kv, v=kv, scratch=SCRATCH)
    assert cost == Cost(2 * 6 * 8 * 8, normed + 2 * 8 * 8 + 2 * 6 * 8 + rows_of_table)

    gate_up, out = weight(10, 8, BF16), unset(6, 5, dtype=BF16)
    cost = REGISTRY["rmsnorm_geglu"].cost(x, gate_up, None, None, out=out, scratch=SCRATCH)
    assert cost == Cost(2 * 6 * 10 * 8, normed + 2 * 10 * 8 + 2 * 6 * 5)
    cost = REGISTRY["rmsnorm_geglu"].cost(x, gate_up, scale, randn(10), out=out, scratch=SCRATCH)
    assert cost == Cost(2 * 6 * 10 * 8, normed + 2 * 10 * 8 + 4 * 10 + 2 * 6 * 5)

    down, whole = weight(8, 5, BF16), 4 * 6 * 8 + 2 * 6 * 8 + 4 * 6
    mlp = Cost(2 * 6 * 10 * 8 + 2 * 6 * 5 * 8, normed + 2 * 10 * 8 + 2 * 8 * 5 + 2 * (2 * 6 * 5) + 4 * 6 * 8 + whole)
    arguments = (gate_up, down, None, None, None, None)
    cost = REGISTRY["rmsnorm_mlp_residual"].cost(*arguments, hidden=out, residual=x, scratch=SCRATCH)
    assert cost == mlp
    arguments = (gate_up, down, scale, randn(10), scale, scale)
    cost = REGISTRY["rmsnorm_mlp_residual"].cost(*arguments, hidden=out, residual=x, scratch=SCRATCH)
    assert cost == mlp + Cost(0, 4 * (10 + 8 + 8))

    index, two = torch.zeros(6, dtype=torch.int32), randn(2, 8)
    arguments = (gate_up, down, two, randn(2, 10), two, two, index)
    cost = REGISTRY["rmsnorm_mlp_residual"].cost(*arguments, hidden=out, residual=x, scratch=SCRATCH)
    assert cost == mlp + Cost(0, 4 * 2 * (10 + 8 + 8) + 4 * 6)

    actions = unset(6, 7)
    arguments = (x, weight(7, 8), randn(7), *no_pull(6, 7))
    cost = REGISTRY["rmsnorm_linear_euler"].cost(*arguments, actions=actions, scratch=SCRATCH)
    guide = 4 * (6 * 7 + 6 + 1)
    assert cost == Cost(2 * 6 * 7 * 8, 4 * 6 * 8 + 4 * 6 + 4 * (7 * 8 + 7) + 2 * 4 * 6 * 7 + guide)

    arguments = (x, weight(7, 8), randn(7), actions, 1.0, 1.5)
    cost = REGISTRY["rmsnorm_linear_second_order"].cost(*arguments, base=actions, actions=actions, scratch=SCRATCH)
    assert cost == Cost(2 * 6 * 7 * 8, 4 * 6 * 8 + 4 * 6 + 4 * (7 * 8 + 7) + 3 * 4 * 6 * 7)

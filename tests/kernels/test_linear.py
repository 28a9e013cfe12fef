"""linear, linear_residual: meaning and cost."""

from __future__ import annotations

import pytest
import torch

from pi0_engine.kernels.linear import linear, linear_residual
from pi0_engine.kernels.registry import REGISTRY, Cost
from tests.support.op_checks import SCRATCH, check, check_stream, randn, stream, unset, unset_stream, weight

BF16 = torch.bfloat16


@pytest.mark.parametrize("rows", [1, 15])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_linear(rows: int, activation: str | None, dtype: torch.dtype) -> None:
    x, w, bias, out = randn(rows, 13, dtype=dtype), weight(7, 13, dtype), randn(7), unset(rows, 7, dtype=dtype)
    linear(x, w, bias, activation, None, out=out, scratch=SCRATCH)
    y = x.double() @ w.double().T + bias.double()
    check(out, y / (1 + (-y).exp()) if activation else y, dtype)


@pytest.mark.parametrize("width", [7, 150])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_linear_begins_a_stream(
    width: int, activation: str | None, sums: bool, scaled: bool, dtype: torch.dtype
) -> None:
    """Some rows of a longer one; the next norm's scale is in the rounded copy alone."""
    x, w, bias = randn(3, 13, dtype=dtype), weight(width, 13, dtype), randn(width)
    next_scale = 1 + 0.3 * randn(width) if scaled else None
    whole = unset_stream(5, width, dtype, sums=sums)
    linear(x, w, bias, activation, next_scale, out=whole[1:4], scratch=SCRATCH)
    y = x.double() @ w.double().T + bias.double()
    check_stream(whole[1:4], y / (1 + (-y).exp()) if activation else y, next_scale, dtype)
    assert all(part[[0, 4]].isnan().all() for part in whole.tensors.values())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("with_next_scale", [False, True])
@pytest.mark.parametrize(("width", "sums"), [(7, False), (150, True)])
def test_linear_residual(
    with_bias: bool, with_gate: bool, with_next_scale: bool, width: int, sums: bool, dtype: torch.dtype
) -> None:
    """The gate multiplies the branch as it is (not 1 + gate), the residual stream stays float32.

    What was in the stream's other parts does not matter: they are NaN here.
    """
    x, w, residual = randn(6, 13, dtype=dtype), weight(width, 13, dtype), unset_stream(6, width, dtype, sums=sums)
    residual.x.copy_(randn(6, width))
    bias, gate = randn(width) if with_bias else None, randn(width) if with_gate else None
    next_scale = 1 + 0.3 * randn(width) if with_next_scale else None
    y = x.double() @ w.double().T
    y = y if bias is None else y + bias.double()
    expected = residual.x.double() + (y if gate is None else gate.double() * y)
    linear_residual(x, w, bias, gate, next_scale, residual=residual, scratch=SCRATCH)
    check_stream(residual, expected, next_scale, dtype)


def test_rows_take_their_own_of_two_gates_and_scales(dtype: torch.dtype) -> None:
    """Tokens with flow times of their own: entry 0 or 1 of a table, by row."""
    index = torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32)
    x, w, gates, scales = randn(5, 13, dtype=dtype), weight(7, 13, dtype), randn(2, 7), 1 + 0.3 * randn(2, 7)
    residual = unset_stream(5, 7, dtype)
    residual.x.copy_(randn(5, 7))
    y = x.double() @ w.double().T
    expected = residual.x.double() + torch.stack([gates[i] for i in index]).double() * y
    own_scales = torch.stack([scales[i] for i in index])
    linear_residual(x, w, None, gates, scales, index, residual=residual, scratch=SCRATCH)
    check_stream(residual, expected, own_scales, dtype)
    bias, begun = randn(7), unset_stream(5, 7, dtype)
    linear(x, w, bias, None, scales, index, out=begun, scratch=SCRATCH)
    check_stream(begun, y + bias.double(), own_scales, dtype)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(AssertionError):
        linear(randn(1, 2), weight(2, 2), randn(2), "gelu", None, out=unset(1, 2), scratch=SCRATCH)


def test_costs() -> None:
    """Six rows of 13 -> 7: 2 * 6 * 13 * 7 FLOP. bfloat16 rows and weights, float32 vectors."""
    x, w, f32 = randn(6, 13, dtype=BF16), weight(7, 13, BF16), randn(7)
    operands = 2 * 6 * 13 + 2 * 7 * 13
    cost = REGISTRY["linear"].cost(x, w, f32, None, None, out=unset(6, 7, dtype=BF16), scratch=SCRATCH)
    assert cost == Cost(flops=1092, bytes=operands + 4 * 7 + 2 * 6 * 7)

    written = 4 * 6 * 7 + 2 * 6 * 7 + 4 * 6  # float32 rows, their bfloat16 copy, one sum each
    out = unset_stream(6, 7, BF16)
    cost = REGISTRY["linear"].cost(x, w, f32, "silu", f32, out=out, scratch=SCRATCH)
    assert cost == Cost(flops=1092, bytes=operands + 4 * 7 + 4 * 7 + written)

    residual, read = stream(randn(6, 7), BF16), 4 * 6 * 7
    cost = REGISTRY["linear_residual"].cost(x, w, f32, f32, f32, residual=residual, scratch=SCRATCH)
    assert cost == Cost(flops=1092, bytes=operands + 3 * 4 * 7 + read + written)
    table, index = randn(2, 7), torch.zeros(6, dtype=torch.int32)
    cost = REGISTRY["linear_residual"].cost(x, w, None, table, table, index, residual=residual, scratch=SCRATCH)
    assert cost == Cost(flops=1092, bytes=operands + 2 * 4 * 14 + 4 * 6 + read + written)
    cost = REGISTRY["linear"].cost(x, w, f32, None, table, index, out=out, scratch=SCRATCH)
    assert cost == Cost(flops=1092, bytes=operands + 4 * 7 + 4 * 14 + 4 * 6 + written)
    with_sums = stream(randn(6, 7), BF16, sums=True)
    cost = REGISTRY["linear_residual"].cost(x, w, None, None, None, residual=with_sums, scratch=SCRATCH)
    assert cost == Cost(flops=1092, bytes=operands + read + written + 4 * 6)

"""linear, linear_residual: meaning and cost."""

from __future__ import annotations

import pytest
import torch

from op_checks import check, randn, unset, weight
from pi0_engine.kernels.linear import linear, linear_residual
from pi0_engine.kernels.registry import REGISTRY, Cost


@pytest.mark.parametrize("rows", [(1,), (3, 5), (2, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_linear(rows: tuple[int, ...], activation: str | None, dtype: torch.dtype) -> None:
    x, w, bias, out = randn(*rows, 13, dtype=dtype), weight(7, 13, dtype), randn(7), unset(*rows, 7, dtype=dtype)
    linear(x, w, bias, activation, out=out)
    y = x.double() @ w.double().T + bias.double()
    check(out, y / (1 + (-y).exp()) if activation else y, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
def test_linear_residual(with_bias: bool, with_gate: bool, dtype: torch.dtype) -> None:
    """The gate multiplies the branch as it is (not 1 + gate), the residual stream stays float32."""
    x, w, residual = randn(2, 3, 13, dtype=dtype), weight(7, 13, dtype), randn(2, 3, 7)
    bias, gate = randn(7) if with_bias else None, randn(7) if with_gate else None
    y = x.double() @ w.double().T
    y = y if bias is None else y + bias.double()
    expected = residual.double() + (y if gate is None else gate.double() * y)
    linear_residual(x, w, bias, gate, residual=residual)
    check(residual, expected, dtype)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(AssertionError):
        linear(randn(1, 2), weight(2, 2), randn(2), "gelu", out=unset(1, 2))


def test_costs() -> None:
    """Six rows of 13 -> 7: 2 * 6 * 13 * 7 FLOP. bfloat16 rows and weights, float32 bias, gate and residual."""
    x, w, f32 = randn(2, 3, 13, dtype=torch.bfloat16), weight(7, 13, torch.bfloat16), randn(7)
    cost = REGISTRY["linear"].cost(x, w, f32, None, out=unset(2, 3, 7, dtype=torch.bfloat16))
    assert cost == Cost(flops=1092, bytes=2 * 6 * 13 + 2 * 7 * 13 + 4 * 7 + 2 * 6 * 7)
    cost = REGISTRY["linear_residual"].cost(x, w, f32, f32, residual=unset(2, 3, 7))
    read_and_written = 2 * 4 * 6 * 7
    assert cost == Cost(flops=1092, bytes=2 * 6 * 13 + 2 * 7 * 13 + 4 * 7 + 4 * 7 + read_and_written)
    without = REGISTRY["linear_residual"].cost(x, w, None, None, residual=unset(2, 3, 7))
    assert without == Cost(flops=1092, bytes=2 * 6 * 13 + 2 * 7 * 13 + read_and_written)

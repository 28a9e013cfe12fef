"""Which arithmetic a CPU's bfloat16 products use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pi0_engine.kernels import gemm
from tests.support.op_checks import check, randn, weight


def test_product_accumulates_in_float32(dtype: torch.dtype) -> None:
    """2000 terms of the same sign: a bfloat16 accumulator would stop growing at 256."""
    x, w = torch.ones(3, 2000, dtype=dtype), torch.ones(5, 2000, dtype=dtype)
    assert torch.equal(gemm.gemm(x, w).float(), torch.full((3, 5), 2000.0))


def test_product_with_bias(dtype: torch.dtype) -> None:
    x, w, bias = randn(2, 3, 13, dtype=dtype), weight(7, 13, dtype), randn(7)
    check(gemm.gemm(x, w, bias), x.double() @ w.double().T + bias.double(), dtype)


@pytest.mark.parametrize("piece", [13, 40, 91])
def test_widening_a_piece_at_a_time_changes_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one row, of several with a shorter last one, and of the whole weight."""
    monkeypatch.setattr(gemm, "cpu_computes_bfloat16", lambda: False)
    x, w, bias = randn(2, 3, 13, dtype=torch.bfloat16), weight(7, 13, torch.bfloat16), randn(7)
    monkeypatch.setattr(gemm, "_PIECE", piece)
    product = gemm.gemm(x, w, bias)
    assert product.shape == (2, 3, 7) and product.dtype == torch.float32
    expected = x.double() @ w.double().T + bias.to(torch.float32).double()
    torch.testing.assert_close(product.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_slow_bfloat16_is_widened(native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "cpu_computes_bfloat16", lambda: native)
    assert gemm.arithmetic_dtype(torch.zeros(1, dtype=torch.bfloat16)) == expected
    assert gemm.arithmetic_dtype(torch.zeros(1)) == torch.float32
    assert gemm.arithmetic_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


@pytest.mark.parametrize(
    ("rates", "native", "dtype"),
    [
        ((420, 169, 184), True, torch.bfloat16),  # Zen 4, AVX512-BF16
        ((72, 149, 155), False, torch.bfloat16),  # the same, told to do without
        ((165, 270, 306), False, torch.bfloat16),  # Emerald Rapids without AMX; how fast it widens is an assumption
        ((50, 110, 150), False, torch.bfloat16),
        ((50, 90, 150), False, torch.float32),  # widening costs more than memory is worth
        ((2000, 1500, 3100), True, torch.float32),
    ],
)
def test_rates_decide(rates: tuple[float, float, float], native: bool, dtype: torch.dtype) -> None:
    products = gemm.CpuProducts(*(1e9 * rate for rate in rates))
    assert (products.native, products.best_dtype) == (native, dtype)
    assert str(products) == "bfloat16 {}, widened to float32 {}, float32 {} GFLOP/s".format(*rates)


def test_rates_are_measured_once_and_say_which_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a way that is made slow the rate is lower: measured is what runs, not what the processor claims."""
    assert gemm.cpu_products() is gemm.cpu_products()
    linear = torch.nn.functional.linear

    def slow_in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for _ in range(40 if weight.dtype == torch.bfloat16 else 1):
            out = linear(x, weight, bias)
        return out

    monkeypatch.setattr(gemm, "_PROBE", (32, 256, 256))
    monkeypatch.setattr(gemm.F, "linear", slow_in_bfloat16)
    products = gemm.cpu_products.__wrapped__()
    assert 0 < products.bfloat16 < products.widened and not products.native


def test_never_widened_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "cpu_products", lambda: gemm.CpuProducts(1.0, 2.0, 2.0))
    tensor = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(KeyError), gemm.never_widened():
        assert gemm.arithmetic_dtype(tensor) == torch.bfloat16
        raise KeyError
    assert gemm.arithmetic_dtype(tensor) == torch.float32

"""Which arithmetic a CPU's bfloat16 products use."""

from __future__ import annotations

import pytest
import torch

from op_checks import check, randn, weight
from pi0_engine.kernels import gemm


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
def test_emulated_bfloat16_is_widened(native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "cpu_computes_bfloat16", lambda: native)
    assert gemm.arithmetic_dtype(torch.zeros(1, dtype=torch.bfloat16)) == expected
    assert gemm.arithmetic_dtype(torch.zeros(1)) == torch.float32
    assert gemm.arithmetic_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f", "avx512_vnni"}, False),
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_bf16"}, True),
        ({"asimd", "bf16"}, True),
        (set(), False),
    ],
)
def test_processors_with_bfloat16(flags: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_cpu_flags", lambda: flags)
    assert gemm.cpu_computes_bfloat16.__wrapped__() is expected

"""What the tests of all ops share: random arguments, outputs that must be overwritten, a bound per dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from models import rel_l2

#: Relative L2 against the formula in float64: some roundings to the dtype (eps 1.2e-7 and 7.8e-3).
BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3}

_random = torch.Generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that ``dtype`` holds exactly."""
    return torch.randn(shape, generator=_random).to(dtype)


def weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (randn(out_features, in_features) / in_features**0.5).to(dtype)


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output: NaN wherever the op forgets to write."""
    return torch.full(shape, torch.nan, dtype=dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """``expected`` float64; ``dtype`` is what the op computes in."""
    error = rel_l2(actual, expected)
    assert error <= BOUND[dtype], f"relative L2 {error:.2e}"

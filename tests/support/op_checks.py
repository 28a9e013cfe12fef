"""What the tests of all ops share: random arguments, outputs that must be overwritten, a bound per dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from pi0_engine.kernels.stream import Scratch, Stream
from tests.support.models import rel_l2

#: Relative L2 against the formula in float64. A float32 sum of 600 products is off by 4.4e-7 in the worst order that
#: there is, one after the other; a rounding to bfloat16 is 1.7e-3, and some follow each other. test_bounds.py beside
#: this file has both, and the mistakes that are beyond the bounds.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
#: The meanings need no working memory.
SCRATCH = Scratch.allocate(torch.device("cpu"), needed=False)

_random = torch.Generator().manual_seed(0)


def begin() -> None:
    """Draw the same numbers again: before each test (conftest.py)."""
    _random.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that ``dtype`` holds exactly."""
    return torch.randn(shape, generator=_random).to(dtype)


def weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (randn(out_features, in_features) / in_features**0.5).to(dtype)


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output: NaN wherever the op forgets to write."""
    return torch.full(shape, torch.nan, dtype=dtype)


def unset_stream(rows: int, width: int, dtype: torch.dtype = torch.float32, *, sums: bool = False) -> Stream:
    """A stream to begin: NaN in every part."""
    blocks = (width + 63) // 64
    return Stream(
        unset(rows, width),
        unset(rows, width, dtype=dtype),
        unset(rows, blocks),
        unset(rows, blocks) if sums else None,
    )


def stream(x: Tensor, dtype: torch.dtype, *, scale: Tensor | None = None, sums: bool = False) -> Stream:
    """A stream of these rows as its writer leaves it for a norm with that adaRMS ``scale``."""
    made = unset_stream(*x.shape, dtype, sums=sums)
    made.x.copy_(x)
    made.rounded.copy_(x if scale is None else x * scale)
    made.square_sums.copy_(block_sums(x.double().square()))
    if made.sums is not None:
        made.sums.copy_(block_sums(x.double()))
    return made


def block_sums(x: Tensor) -> Tensor:
    """Sums over columns 0..63, 64..127, ...; the last block may be shorter."""
    return torch.stack([part.sum(dim=-1) for part in x.split(64, dim=-1)], dim=-1)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """``expected`` float64; ``dtype`` is what the op computes in."""
    error = rel_l2(actual, expected)
    assert error <= BOUND[dtype], f"relative L2 {error:.2e}"


def check_stream(actual: Stream, expected: Tensor, next_scale: Tensor | None, dtype: torch.dtype) -> None:
    """``expected`` float64 [rows, W]; every other part follows from the rows as they are stored."""
    assert (actual.x.dtype, actual.rounded.dtype) == (torch.float32, dtype)
    check(actual.x, expected, dtype)
    x = actual.x.double()
    assert torch.equal(actual.rounded, (actual.x if next_scale is None else actual.x * next_scale).to(dtype))
    check(actual.square_sums, block_sums(x.square()), torch.float32)
    if actual.sums is not None:
        # Sums of both signs cancel: the error is measured against what is added up.
        error = (actual.sums - block_sums(x)).norm() / block_sums(x.abs()).norm()
        assert error <= BOUND[torch.float32], f"sums are off by {error:.2e}"


def tf32(x: Tensor) -> Tensor:
    """float64: 10 bits behind the leading one, as tensor cores round float32 operands where they are allowed to."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def layer_norm(x: Tensor) -> Tensor:
    """float64, without weight and bias."""
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """float64."""
    x = x.double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed if scale is None else normed * scale.double()

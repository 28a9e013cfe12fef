"""Matrix products as torch runs them, shared by the meanings of the ops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

#: Weights that are widened at a time: 16 MB in float32, which the allocator reuses and the caches partly hold. Whole
#: matrices are slower: 25 instead of 14 ms for 8192 x 1024 times 50 rows, 422 instead of 363 ms for 32768 x 2048
#: times 524 (two Cascade Lake cores).
_PIECE = 1 << 22

#: Rows, K and N of the product that is timed: an image's tokens by a part of the language model's weights.
_PROBE = (256, 2048, 2048)
#: The fastest of so many counts.
_PROBE_RUNS = 3
#: float32 takes twice the memory, so it is chosen where it is so many times as fast as bfloat16. Where weights have to
#: be widened the probe says 1.03 to 1.35 on two cores of a Zen 4 told to do without its bfloat16 instructions, and π0
#: with three cameras takes the same there: 26.2 s widened, 26.7 s in float32.
_CLEARLY = 1.5


@dataclass(frozen=True)
class CpuProducts:
    """How fast this processor multiplies by a weight, in FLOP/s, whatever its flags say.

    Attributes:
        bfloat16: in bfloat16.
        widened: the same weight, widened to float32 on every call.
        float32: a weight that is float32.
    """

    bfloat16: float
    widened: float
    float32: float

    @property
    def native(self) -> bool:
        """Whether bfloat16 weights are better multiplied as they are than widened."""
        return self.bfloat16 >= self.widened

    @property
    def best_dtype(self) -> torch.dtype:
        """What an engine should run in where the user does not say: bfloat16, unless float32 is clearly faster."""
        clearly = self.float32 > _CLEARLY * max(self.bfloat16, self.widened)
        return torch.float32 if clearly else torch.bfloat16

    def __str__(self) -> str:
        rates = (self.bfloat16, self.widened, self.float32)
        return "bfloat16 {:.0f}, widened to float32 {:.0f}, float32 {:.0f} GFLOP/s".format(*(r / 1e9 for r in rates))


@cache
def cpu_products() -> CpuProducts:
    """Measured at the first call, in 0.1 to 0.3 s.

    Instructions do not say it: oneDNN multiplies bfloat16 at a third of float32's rate without AVX512-BF16 (50 against
    150 GFLOP/s on two Cascade Lake cores), at half of it on an Emerald Rapids that has AVX512-BF16 and no AMX (165
    against 306), and at 2.3 times float32's on a Zen 4 that has the same instructions (420 against 184).
    """
    rows, k, n = _PROBE
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        x, weight = torch.randn(rows, k, generator=random), torch.randn(n, k, generator=random)
        x16, weight16 = x.bfloat16(), weight.bfloat16()
        ways = [lambda: F.linear(x16, weight16), lambda: _widened(x, weight16), lambda: F.linear(x, weight)]
        seconds = [float("inf")] * len(ways)
        for _ in range(_PROBE_RUNS):  # in turns: what disturbs one disturbs all
            for way, product in enumerate(ways):
                started = time.perf_counter()
                product()
                seconds[way] = min(seconds[way], time.perf_counter() - started)
    return CpuProducts(*(2.0 * rows * k * n / s for s in seconds))


_never_widen = False


def cpu_computes_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 at least as fast as float32 values made from it on every call."""
    return _never_widen or cpu_products().native


@contextmanager
def never_widened() -> Iterator[None]:
    """Inside, bfloat16 is multiplied by the processor's own instructions, however slow: to measure what that costs."""
    global _never_widen
    _never_widen = True
    try:
        yield
    finally:
        _never_widen = False


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which to multiply ``tensor``: its own, except bfloat16 on a CPU that is faster in float32."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not cpu_computes_bfloat16():
        return torch.float32
    return tensor.dtype


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]; accumulated in float32 -> [..., N].

    The result is in the arithmetic dtype, for the caller to round when it stores it.
    """
    dtype = arithmetic_dtype(weight)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if dtype == weight.dtype:
        return F.linear(x, weight, bias)
    out = _widened(x, weight)
    return out if bias is None else out.add_(bias)


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """x float32 [..., K] times a narrower weight [N, K] transposed, some rows of it widened at a time -> [..., N]."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    pieces = -(-weight.numel() // _PIECE)
    for columns, rows in zip(out.tensor_split(pieces, dim=-1), weight.tensor_split(pieces), strict=True):
        columns.copy_(F.linear(x, rows.to(x.dtype)))
    return out

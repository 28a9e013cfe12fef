"""An op's Triton kernel against its meaning: on a GPU where there is one, else in Triton's interpreter. For tests.

The meaning is evaluated in float64 on the very values that the kernel gets, so what is measured is the kernel's own
rounding. Every tensor a kernel gets lies between NaN: what it reads outside shows in the result, what it writes
outside shows around it.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs, Rule
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.gpu.target import TARGETS, Target, target_of
from pi0_engine.kernels.registry import all_ops
from pi0_engine.kernels.stream import Scratch, Stream, sum_blocks
from tests.support.models import rel_l2

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
#: As in the engine, without a GPU that of sm_90, so that tensor descriptors are used.
TARGET: Target = target_of(DEVICE) if not INTERPRETED else TARGETS[90]

#: Parametrizes a test. Triton's interpreter multiplies bfloat16 wrongly, so that it runs on a GPU only.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter gives garbage for tl.dot on bfloat16"),
    ),
]

#: Relative L2 against the formula in float64. In 16 bits what enters a product is the rounded copy of a float32 stream,
#: or a probability, and the result is rounded once more. One rounding is 2e-4 in float16 (unit roundoff 4.9e-4, and
#: the root mean square over many values is 0.4 of that), so three are 3.6e-4; bfloat16 has 8 times that. float32
#: accumulates K <= 600 products in an order of its own: 2e-7 is typical, sqrt(600) * 6e-8 the most to be expected.
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: The same where 16-bit operands are given as they are and the result is float32: only the accumulation is left, and
#: tensor cores cut off the low bits of what they add.
ACCUMULATION_BOUND = 1e-5

#: Elements of NaN before and after a tensor; keeps it on a 256-byte boundary in any dtype.
_GUARD = 256


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A tensor as the middle of a larger one, whose ends hold NaN."""

    whole: Tensor
    tensor: Tensor

    @classmethod
    def copy_of(cls, tensor: Tensor) -> _Guarded:
        whole = torch.full((tensor.numel() + 2 * _GUARD,), torch.nan, dtype=tensor.dtype, device=DEVICE)
        middle = whole[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
        middle.copy_(tensor)
        return cls(whole, middle)

    def check(self, name: str) -> None:
        ends = torch.cat([self.whole[:_GUARD], self.whole[-_GUARD:]])
        assert bool(ends.isnan().all()), f"{name} was written outside of its bounds"


class Problem:
    """Random arguments of one kernel call, the same whenever the test of that ``name`` runs."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._random = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._random).to(dtype or self.dtype)

    def vector(self, n: int, *, around: float = 0.0) -> Tensor:
        """float32 [n]: a bias, a gate, an adaRMS scale."""
        return around + 0.3 * self.randn(n, dtype=torch.float32)

    def table(self, n: int, *, around: float = 0.0) -> Tensor:
        """float32 [2, n]: such a vector for each of two flow times."""
        return torch.stack([self.vector(n, around=around), self.vector(n, around=around)])

    def time_index(self, rows: int) -> Tensor:
        """int32 [rows], both times in any order."""
        return torch.randint(0, 2, (rows,), generator=self._random, dtype=torch.int32)

    def weight(self, n: int, k: int, dtype: torch.dtype | None = None) -> Tensor:
        return (self.randn(n, k, dtype=torch.float32) / k**0.5).to(dtype or self.dtype)

    def stream(self, rows: int, width: int, scale: Tensor | None = None, *, sums: bool = False) -> Stream:
        """As the engine leaves one behind: rounded copy and sums of x."""
        stream = self.unset_stream(rows, width, sums=sums)
        stream.write(self.randn(rows, width, dtype=torch.float32) + 0.3, scale)
        return stream

    def unset_stream(self, rows: int, width: int, *, sums: bool = False) -> Stream:
        parts = [unset(rows, sum_blocks(width)) for _ in range(2)]
        return Stream(unset(rows, width), unset(rows, width, dtype=self.dtype), parts[0], parts[1] if sums else None)

    def residual(self, rows: int, width: int, *, sums: bool = False) -> Stream:
        """Only x is there: what else a kernel has to write is NaN."""
        return dataclasses.replace(
            self.unset_stream(rows, width, sums=sums), x=self.randn(rows, width, dtype=torch.float32)
        )


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output: NaN wherever the kernel forgets to write."""
    return torch.full(shape, torch.nan, dtype=dtype)


def scratch(partials: int = 1 << 18) -> Scratch:
    return Scratch(
        torch.full((partials,), torch.nan, device=DEVICE),
        torch.zeros(1 << 10, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )


def check_kernel(
    op: str,
    configs: LaunchConfig | dict[str, LaunchConfig],
    args: tuple[Any, ...],
    outputs: dict[str, Tensor | Stream | None],
    dtype: torch.dtype,
    *,
    target: Target = TARGET,
    working_memory: Scratch | None = None,
    operands_rounded: bool = True,
    allowed: float = 0.0,
) -> None:
    """Run ``op`` with ``configs`` (by name where it has several) twice, and compare it with its meaning.

    ``outputs`` are the keyword arguments that it writes; what they hold is there before each run. Unless
    ``operands_rounded``, the kernel multiplies just what it is given, and its float32 results must show that.
    ``allowed`` is added to the bound: what the problem itself does to a rounding, worked out where it is given.
    """
    named = configs if isinstance(configs, dict) else {op: configs}
    rules = [Rule(name, config, "a test") for name, config in named.items()]
    launcher = Launcher(target, LaunchConfigs(rules), concurrent=not INTERPRETED)
    entry = all_ops()[op]
    memory = working_memory or scratch()
    extra = {} if op == "embed_prompt" else {"scratch": memory}
    kernel = entry.load("triton", launcher)

    with torch.inference_mode():
        guarded_args = [_each(value, _Guarded.copy_of) for value in args]
        runs: list[dict[str, Any]] = []
        for _ in range(2):
            guarded = {name: _each(value, _Guarded.copy_of) for name, value in outputs.items()}
            kernel(*map(_inner, guarded_args), **{name: _inner(value) for name, value in guarded.items()}, **extra)
            for name, value in guarded.items():
                _each(value, lambda part, name=name: part.check(name))
            runs.append({name: _inner(value) for name, value in guarded.items()})
            assert not memory.counters.any(), "counters are not zero between launches"
            assert not memory.barrier.any(), "the barrier is not zero between launches"

        expected = {name: _each(value, lambda tensor: tensor.to(DEVICE).double()) for name, value in outputs.items()}
        wide = [_each(value, _widened) for value in args]
        entry.meaning(*wide, **expected, **extra)

    for name in outputs:
        for part, first in _parts(name, runs[0][name]).items():
            again, wanted = _parts(name, runs[1][name])[part], _parts(name, expected[name])[part]
            assert torch.equal(first, again), f"{part} differs between two runs"
            error = 0.0 if torch.equal(first.double(), wanted) else rel_l2(first.cpu(), wanted.cpu())
            bound = BOUND[first.dtype if first.dtype != torch.float32 else dtype]
            if first.dtype == torch.float32 and not operands_rounded:
                bound = min(bound, ACCUMULATION_BOUND)
            bound += allowed
            assert error <= bound, f"{part}: relative L2 {error:.2e} > {bound:.1e}"


def _each(value: Any, function: Any) -> Any:
    """``function`` of a floating-point tensor, or of each of a stream's; other tensors move to the device."""
    if isinstance(value, Stream):
        return Stream(**{name: function(part) for name, part in value.tensors.items()})
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value.to(DEVICE)
    return function(value) if isinstance(value, _Guarded) else value


def _inner(value: Any) -> Any:
    if isinstance(value, Stream):
        return Stream(**{name: part.tensor for name, part in value.tensors.items()})
    return value.tensor if isinstance(value, _Guarded) else value


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE).double()


def _parts(name: str, value: Tensor | Stream | None) -> dict[str, Tensor]:
    if isinstance(value, Stream):
        return {f"{name}.{part}": tensor for part, tensor in value.tensors.items()}
    return {} if value is None else {name: value}

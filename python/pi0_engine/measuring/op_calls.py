"""The op calls of an inference as things to run on their own: recorded without data, filled with random numbers.

What a kernel is timed or checked with has the shapes, dtypes and options of the real call, and never zeros or ones. It
is checked against the op's meaning in float64, and timed with what an inference reads from memory cold in the caches.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config
from pi0_engine.engine.plan import ShapePlan, rope_table
from pi0_engine.engine.trace import Call, TracingOps, run_on_meta
from pi0_engine.kernels.registry import OpFunction, Ops, all_ops, nbytes
from pi0_engine.kernels.stream import Scratch, Stream, of_rows

#: Largest relative L2 difference of an output from the op's meaning in float64: some roundings to the dtype.
AGREEMENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

#: Arguments that are weights: another one in every layer.
WEIGHTS = ("weight", "gate_up", "down")
#: Arguments that nothing wrote just before: weights, those that an attention kernel brings into L2 for the op behind,
#: and the prefix's keys and values in the flow loop. They come from memory; everything else is still in a cache.
COLD = (*WEIGHTS, "ahead", "position", "prefix_k", "prefix_v")

#: Keyword arguments that are working memory, and those that an op reads as well as writes.
_WORKING = ("scratch", "hidden")
_UPDATED = ("residual", "actions")
#: Factors, which are around 1.
_FACTORS = ("scale", "gate", "next_scale", "max_weight")
#: Copies of a cold argument at most.
_MOST_COPIES = 512

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OpCall:
    """One op call.

    Attributes:
        arguments: by name; tensors are on torch's "meta" device: shapes without contents.
        valid_rows: of an observation's prefix; the others are padding.
    """

    call: Call
    arguments: Arguments
    valid_rows: int

    @property
    def op(self) -> str:
        return self.call.op

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls of the same op, shapes and dtypes."""
        return (self.call.op, self.call.shapes)

    @property
    def label(self) -> str:
        """Op and shape, as people tell calls apart."""
        return f"{self.op} {self.shape}"

    @property
    def weight_bytes(self) -> int:
        """Bytes that come from memory in every call, because much else was read since the last one."""
        return nbytes(*(self.arguments.get(name) for name in WEIGHTS))

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of what is multiplied, or of what is stored where nothing is."""
        for name in ("weight", "gate_up", "qkv", "q"):
            if isinstance(self.arguments.get(name), Tensor):
                dtype: torch.dtype = self.arguments[name].dtype
                return dtype
        stream = self.arguments["out"]
        assert isinstance(stream, Stream), self.op
        return stream.rounded.dtype

    @property
    def shape(self) -> str:
        """For people: rows x columns x products of a linear layer; queries, keys and width of attention."""
        named, out = self.arguments, self.arguments.get("out")
        if "weight" in named:
            n, k = named["weight"].shape
            return f"{round(self.call.cost.flops / (2 * n * k))}x{n}x{k}"
        if "gate_up" in named:
            return "x".join(str(size) for size in (named["hidden"].shape[0], *named["gate_up"].shape))
        if "prefix_k" in named:
            keys, rows = named["prefix_k"].shape[1], named["suffix_k"].shape[0]
            return f"{named['q'].shape[0]} q, {keys}+{rows} k"
        if "k" in named:
            return f"{'x'.join(str(size) for size in named['q'].shape[:2])} q, {named['k'].shape[1]} k"
        if "qkv" in named:
            return f"{'x'.join(str(size) for size in named['qkv'].shape[:2])} q, {named['qkv'].shape[1]} k"
        tensor = out.x if isinstance(out, Stream) else next(iter(reversed(named.values())))
        return "x".join(str(size) for size in tensor.shape)


def record_op_calls(
    config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, *, prompt_tokens: int | None = None
) -> list[OpCall]:
    """Every op call of one inference of these lengths, in order.

    ``prompt_tokens`` are the valid ones among the plan's rows for prompts; all rows where not given.
    """
    kept: list[Arguments] = []

    def keep(name: str) -> OpFunction:
        signature = inspect.signature(all_ops()[name].meaning)
        return lambda *args, **kwargs: kept.append(dict(signature.bind(*args, **kwargs).arguments))

    tracer = TracingOps(Ops({name: keep(name) for name in all_ops()}, ()))
    run_on_meta(tracer, config, plan, dtype, tracer.lap)
    valid_rows = plan.prefix if prompt_tokens is None else min(plan.image_rows) + prompt_tokens
    return [OpCall(call, arguments, valid_rows) for call, arguments in zip(tracer.calls, kept, strict=True)]


def distinct(calls: Iterable[OpCall]) -> list[tuple[OpCall, int]]:
    """The first of each kind of call, and how many there are of it."""
    found: dict[tuple[Any, ...], tuple[OpCall, int]] = {}
    for call in calls:
        first, count = found.get(call.key, (call, 0))
        found[call.key] = first, count + 1
    return list(found.values())


def fill(call: OpCall, device: torch.device, scratch: Scratch, seed: int = 0) -> Arguments:
    """The call's arguments on a device, filled with random numbers of a size that a network has.

    What the op only writes holds NaN, so that it shows where it does not.
    """
    return _Filler(call, device, scratch, seed).arguments()


def repeated(
    function: Callable[..., object], arguments: Arguments, times: int, cache_bytes: int
) -> list[Callable[[], object]]:
    """``times`` calls or more, as they follow each other in the engine: each reads what is cold from other memory.

    Of each such argument there are so many copies that together they are twice the cache, and 512 at most: a call then
    finds none of its own there, as when the other layers have run since the last time. Without a cache all calls share
    their arguments.
    """
    pools: dict[str, list[Tensor]] = {}
    for name in COLD:
        value = arguments.get(name)
        if isinstance(value, Tensor) and cache_bytes:
            copies = min(max(2, math.ceil(2 * cache_bytes / nbytes(value))), _MOST_COPIES)
            pools[name] = [value, *(value.clone() for _ in range(copies - 1))]
    count = max([times, *(len(pool) for pool in pools.values())])
    chosen = ({name: pool[index % len(pool)] for name, pool in pools.items()} for index in range(count))
    return [functools.partial(function, **{**arguments, **own}) for own in chosen]


def expected_outputs(op: str, arguments: Arguments) -> Arguments:
    """What the op's meaning makes of these arguments in float64, which stay as they are: its outputs by name."""
    wide = {name: _each(value, _widened) for name, value in arguments.items()}
    all_ops()[op].meaning(**wide)
    return {name: wide[name] for name in output_names(op)}


def verify(
    call: OpCall, function: Callable[..., object], arguments: Arguments, expected: Arguments | None = None
) -> float:
    """Largest relative L2 difference of any output of ``function`` from the op's meaning in float64.

    Args:
        arguments: from :func:`fill`; all but working memory stay as they are.
        expected: of :func:`expected_outputs` for these arguments, where they are there already.

    Raises:
        ValueError: an output that is not finite, or further off than its dtype's roundings explain.
    """
    mine = {**arguments, **{name: _each(arguments.get(name), Tensor.clone) for name in output_names(call.op)}}
    worst = 0.0
    with torch.inference_mode():
        wanted = expected_outputs(call.op, arguments) if expected is None else expected
        function(**mine)
        for name in output_names(call.op):
            for actual, exact in zip(_tensors(mine[name]), _tensors(wanted[name]), strict=True):
                # A rounded copy of float32 results has its own dtype's rounding, a float32 result that of its operands.
                bound = AGREEMENT[call.operand_dtype if actual.dtype == torch.float32 else actual.dtype]
                error = float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))
                if not error <= bound:
                    raise ValueError(f"wrong: {name} is off by {error:.1e} (relative L2), expected <= {bound:.0e}")
                worst = max(worst, error)
    return worst


def output_names(op: str) -> list[str]:
    """The keyword-only parameters, less the working memory."""
    parameters = inspect.signature(all_ops()[op].meaning).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _WORKING]


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of a tensor, or of each of a stream's."""
    if isinstance(value, Stream):
        return Stream(**{part: function(tensor) for part, tensor in value.tensors.items()})
    return function(value) if isinstance(value, Tensor) else value


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor.clone()


def _tensors(value: Any) -> Sequence[Tensor]:
    if isinstance(value, Stream):
        return list(value.tensors.values())
    return [value] if isinstance(value, Tensor) else []


class _Filler:
    def __init__(self, call: OpCall, device: torch.device, scratch: Scratch, seed: int) -> None:
        self._call, self._meta, self._device, self._scratch = call, call.arguments, device, scratch
        self._random = torch.Generator(device).manual_seed(seed)
        self._only_written = {*output_names(call.op), *_WORKING} - {*_UPDATED}

    def arguments(self) -> Arguments:
        filled = {name: self._value(name, value) for name, value in self._meta.items()}
        for name, value in filled.items():
            if isinstance(value, Stream) and name not in self._only_written:
                # Read with the norm's scale, where the op has one.
                scale = of_rows(filled.get("scale"), filled.get("time_index"))
                value.write(self._normal(self._meta[name].x.shape), scale)
        return filled

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, Scratch):
            return self._scratch
        return _each(value, functools.partial(self._filled, name))

    def _filled(self, name: str, like: Tensor) -> Tensor:
        assert like.is_contiguous(), f"{self._call.label}: {name} has gaps"
        if name in self._only_written:
            return torch.full(like.shape, torch.nan, dtype=like.dtype, device=self._device)
        if name == "positions":
            rows = self._meta["rope_table"].shape[0]
            return torch.randint(0, rows, like.shape, generator=self._random, dtype=like.dtype, device=self._device)
        if name == "time_index":
            return torch.randint(0, 2, like.shape, generator=self._random, dtype=like.dtype, device=self._device)
        if name == "rope_table":
            return rope_table(*like.shape).to(self._device)
        if name in ("length", "lengths"):
            return torch.full(like.shape, self._call.valid_rows, dtype=like.dtype, device=self._device)
        drawn = self._normal(like.shape)
        if name in (*WEIGHTS, "ahead"):
            drawn /= math.sqrt(like.shape[-1])
        if name == "weight" and self._call.op == "layernorm_linear":  # its rows do not see a mean
            drawn -= drawn.mean(dim=1, keepdim=True)
        if name in _FACTORS:
            drawn = 1 + 0.1 * drawn
        if name == "prefix_weights":
            drawn = drawn.sigmoid()
        return drawn.to(like.dtype)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self._device)

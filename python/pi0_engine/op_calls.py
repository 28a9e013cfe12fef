"""The op calls of an inference as things to run on their own: recorded without data, filled with random numbers.

What a kernel is timed or checked with has the shapes, dtypes and options of the real call, and never zeros or ones.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.trace import Call, TracingOps, run_on_meta
from pi0_engine.kernels.registry import OpFunction, Ops, all_ops
from pi0_engine.kernels.stream import Scratch, Stream

#: Arguments that are weights: another one in every layer.
WEIGHTS = ("weight", "gate_up", "down", "ahead")

#: Sets of weights at most.
_MOST_COPIES = 64

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OpCall:
    """One op call. ``arguments`` by name hold tensors of torch's "meta" device: shapes without contents."""

    call: Call
    arguments: Arguments

    @property
    def op(self) -> str:
        return self.call.op

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls of the same op, shapes and dtypes."""
        return (self.call.op, self.call.shapes)

    @property
    def weight_bytes(self) -> int:
        tensors = [self.arguments[name] for name in WEIGHTS if isinstance(self.arguments.get(name), Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

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


def record_op_calls(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype) -> list[OpCall]:
    """Every op call of one inference of these lengths, in order."""
    kept: list[Arguments] = []

    def keep(name: str) -> OpFunction:
        signature = inspect.signature(all_ops()[name].meaning)
        return lambda *args, **kwargs: kept.append(dict(signature.bind(*args, **kwargs).arguments))

    tracer = TracingOps(Ops({name: keep(name) for name in all_ops()}, ()))
    run_on_meta(tracer, config, plan, dtype, tracer.lap)
    return [OpCall(call, arguments) for call, arguments in zip(tracer.calls, kept, strict=True)]


def fill(call: OpCall, device: torch.device, scratch: Scratch, seed: int = 0) -> Arguments:
    """The call's arguments on a device, filled with random numbers of a size that a network has."""
    return _Filler(call, device, scratch, seed).arguments()


def repeated(
    function: OpFunction, call: OpCall, arguments: Arguments, times: int, device: torch.device
) -> list[Callable[[], object]]:
    """``times`` calls or more, as they follow each other in the engine: every one with other weights.

    On a GPU they are so many that together they are twice its L2 cache, where this takes at most 64: a call then reads
    its weights from memory, as it does when the other layers have run since the last time.
    """
    copies = 1
    if device.type == "cuda" and call.weight_bytes:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = max(1, min(-(-2 * cache // call.weight_bytes), _MOST_COPIES))
    sets = _with_other_weights(arguments, copies)
    return [functools.partial(function, **sets[index % copies]) for index in range(max(times, copies))]


def _with_other_weights(arguments: Arguments, copies: int) -> list[Arguments]:
    """``copies`` sets of arguments that share everything but their weights, which lie in different memory."""
    sets = [arguments]
    for _ in range(1, copies):
        fresh = {name: arguments[name].clone() for name in WEIGHTS if isinstance(arguments.get(name), Tensor)}
        sets.append({**arguments, **fresh})
    return sets


def deviation(op: str, function: OpFunction, arguments: Arguments) -> float:
    """Largest relative L2 difference between ``function`` and the op's meaning among all outputs; inf where not finite.

    Neither changes ``arguments``.
    """
    meaning, mine = all_ops()[op].meaning, _own_outputs(op, arguments)
    function(**mine)
    expected = _own_outputs(op, arguments)
    meaning(**expected)
    worst = 0.0
    for name in output_names(op):
        for actual, wanted in zip(_tensors(mine[name]), _tensors(expected[name]), strict=True):
            difference = (actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
            worst = max(worst, float(difference) if bool(torch.isfinite(difference)) else math.inf)
    return worst


def output_names(op: str) -> list[str]:
    """The keyword-only parameters, less the working memory."""
    parameters = inspect.signature(all_ops()[op].meaning).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "scratch"]


def _own_outputs(op: str, arguments: Arguments) -> Arguments:
    return {**arguments, **{name: _clone(arguments[name]) for name in output_names(op)}}


def _clone(value: Any) -> Any:
    if isinstance(value, Stream):
        return Stream(**{part: tensor.clone() for part, tensor in value.tensors.items()})
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Sequence[Tensor]:
    if isinstance(value, Stream):
        return list(value.tensors.values())
    return [value] if isinstance(value, Tensor) else []


class _Filler:
    def __init__(self, call: OpCall, device: torch.device, scratch: Scratch, seed: int) -> None:
        self._op, self._meta, self._device, self._scratch = call.op, call.arguments, device, scratch
        self._random = torch.Generator(device).manual_seed(seed)

    def arguments(self) -> Arguments:
        filled = {name: self._value(name, value) for name, value in self._meta.items()}
        for name, value in filled.items():
            if isinstance(value, Stream):  # read with the norm's scale, where the op has one
                value.write(self._normal(self._meta[name].x), filled.get("scale"))
        return filled

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, Scratch):
            return self._scratch
        if isinstance(value, Stream):
            empty = {part: torch.empty_like(t, device=self._device) for part, t in value.tensors.items()}
            return Stream(**empty)
        if not isinstance(value, Tensor):
            return value
        if name == "positions":
            rows = self._meta["rope_table"].shape[0]
            return torch.arange(value.numel(), dtype=value.dtype, device=self._device) % rows
        if name in ("length", "lengths"):
            return torch.full(value.shape, self._valid_rows(), dtype=value.dtype, device=self._device)
        if name in WEIGHTS:
            weight = self._normal(value).float() / math.sqrt(value.shape[-1])
            if self._op == "layernorm_linear":  # its kernel relies on rows that do not see a mean
                weight -= weight.mean(dim=1, keepdim=True)
            return weight.to(value.dtype)
        return self._normal(value)

    def _valid_rows(self) -> int:
        """Where the op takes a number of valid prefix rows: all that there are."""
        keys = self._meta.get("prefix_k", self._meta.get("k"))
        return int(self._meta["start"] + self._meta["out"].x.shape[0] if keys is None else keys.shape[1])

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._random, device=self._device).to(like.dtype)

"""Every distinct op call of an inference, recorded without running it, then given random data on a real device.

The stages run as they are on torch's "meta" device with ops that only write down what they are called with.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config
from pi0_engine.engine.pipeline import run
from pi0_engine.engine.plan import ShapePlan, Workspace, rope_table
from pi0_engine.engine.time_terms import TimeTerms
from pi0_engine.engine.weights import pack_weights, shapes_only
from pi0_engine.kernels.registry import Cost, Op, Ops, all_ops, nbytes
from pi0_engine.kernels.stream import Scratch, Stream

#: Arguments that were not just written when the op runs: weights, and the prefix's keys and values in the flow loop.
#: They come from memory, so a timing has to take fresh ones each time; everything else is still in the cache.
COLD = ("weight", "gate_up", "down", "position", "ahead", "prefix_k", "prefix_v")
#: Keyword arguments that an op reads as well as writes.
_UPDATED = ("residual", "actions")


@dataclass(frozen=True)
class Problem:
    """One op with shapes; ``arguments`` by name, tensors on the meta device.

    Attributes:
        stage: where it is called first.
        calls: how often an inference calls it.
        length: valid prefix rows of the observation.
    """

    stage: str
    op: Op
    arguments: Mapping[str, Any]
    calls: int
    length: int

    @property
    def cost(self) -> Cost:
        return self.op.cost(**self.arguments)

    @property
    def weight_bytes(self) -> int:
        """Bytes that must come from memory in every call, because much else was read since the last one."""
        return nbytes(*(self.arguments.get(name) for name in ("weight", "gate_up", "down")))

    @property
    def name(self) -> str:
        """Op and sizes: "linear_residual 532x16384x2048", rows x products x columns; of an attention its output."""
        weights = [self.arguments[name] for name in ("weight", "gate_up") if name in self.arguments]
        if not weights:
            out = self.arguments["out"]
            size = "x".join(map(str, (out.x if isinstance(out, Stream) else out).shape))
            keys = f" on {self.arguments['prefix_k'].shape[1]}" if "prefix_k" in self.arguments else ""
            return f"{self.op.name} {size}{keys}"
        x = self.arguments.get("x", self.arguments.get("patches", self.arguments.get("residual")))
        rows = (x.x if isinstance(x, Stream) else x).shape[0]
        return f"{self.op.name} {rows}x{weights[0].shape[1]}x{weights[0].shape[0]}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the arguments that the op writes."""
        keywords = [p.name for p in _signature(self.op).parameters.values() if p.kind == p.KEYWORD_ONLY]
        return tuple(n for n in keywords if n not in ("scratch", "hidden") and self.arguments.get(n) is not None)

    def materialize(self, device: torch.device, scratch: Scratch, seed: int = 0) -> dict[str, Any]:
        """Arguments with random contents; what the op only writes holds NaN."""
        random = torch.Generator(device).manual_seed(seed)
        values = {n: self._fill(n, v, device, scratch, random) for n, v in self.arguments.items()}
        if self.op.name == "layernorm_linear":  # its weight has LayerNorm's mean folded in
            values["weight"].copy_(values["weight"].float() - values["weight"].float().mean(dim=1, keepdim=True))
        for name, value in values.items():
            if isinstance(value, Stream) and (name not in self.outputs or name in _UPDATED):
                value.write(value.x.clone(), values.get("scale"))
        return values

    def _fill(self, name: str, value: Any, device: torch.device, scratch: Scratch, random: torch.Generator) -> Any:
        if isinstance(value, Scratch):
            return scratch
        if isinstance(value, Stream):
            parts = {p: self._fill(name, t, device, scratch, random) for p, t in value.tensors.items()}
            return Stream(**parts)
        if not isinstance(value, Tensor):
            return value
        assert value.is_contiguous(), f"{self.name}: {name} has gaps"
        if name in ("lengths", "length"):
            return torch.full(value.shape, self.length, dtype=value.dtype, device=device)
        if name == "positions":
            rows = self.arguments["rope_table"].shape[0]
            return torch.randint(0, rows, value.shape, generator=random, dtype=value.dtype, device=device)
        if name == "rope_table":
            return rope_table(*value.shape).to(device)
        if name == "hidden" or (name in self.outputs and name not in _UPDATED):
            return torch.full(value.shape, torch.nan, dtype=value.dtype, device=device)
        drawn = torch.randn(value.shape, generator=random, device=device)
        if name in ("weight", "gate_up", "down"):
            drawn /= math.sqrt(value.shape[-1])
        elif name in ("scale", "gate", "next_scale"):
            drawn = 1 + 0.1 * drawn
        return drawn.to(value.dtype)


@functools.cache
def _signature_of(meaning: Callable[..., None]) -> inspect.Signature:
    return inspect.signature(meaning)


def _signature(op: Op) -> inspect.Signature:
    return _signature_of(op.meaning)


class _Recording(Ops):
    """Keeps every call as (stage, op, arguments by name) and runs nothing."""

    def __init__(self) -> None:
        super().__init__({name: functools.partial(self._record, op) for name, op in all_ops().items()}, ())
        self.calls: list[tuple[str, Op, dict[str, Any]]] = []
        self._unstaged = 0

    def lap(self, stage: str) -> None:
        self.calls[self._unstaged :] = [(stage, op, named) for _, op, named in self.calls[self._unstaged :]]
        self._unstaged = len(self.calls)

    def _record(self, op: Op, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("", op, dict(_signature(op).bind(*args, **kwargs).arguments)))


def problems(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, *, prompt: int) -> list[Problem]:
    """The distinct calls of one inference of these lengths, in the order of the first of each.

    ``prompt`` is the valid tokens among the plan's prompt rows.
    """
    ops, meta, source = _Recording(), torch.device("meta"), shapes_only(config)
    weights = pack_weights(source, dtype, meta)
    steps = TimeTerms(source, weights.expert, meta)(plan.num_steps)
    space = Workspace(config, plan, dtype, meta, Scratch.allocate(meta, needed=True))
    run(ops, config, weights, steps, space, ops.lap)
    length = plan.image_rows[0] + prompt
    found: dict[Any, Problem] = {}
    for stage, op, arguments in ops.calls:
        key = (op.name, *((name, _identity(value)) for name, value in arguments.items()))
        calls = found[key].calls + 1 if key in found else 1
        found[key] = Problem(found[key].stage if key in found else stage, op, arguments, calls, length)
    return list(found.values())


def stage_floors(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, ceilings: dict[str, float]) -> dict[str, Any]:
    """Per stage and in all: FLOP, bytes of weights, and the time in ms that neither of them can be beaten in.

    Activations count nothing: in principle they never leave the cache. That makes the floor lower, never higher.
    """
    flops: dict[str, float] = {}
    read: dict[str, float] = {}
    for problem in problems(config, plan, dtype, prompt=0):
        flops[problem.stage] = flops.get(problem.stage, 0.0) + problem.calls * problem.cost.flops
        read[problem.stage] = read.get(problem.stage, 0.0) + problem.calls * problem.weight_bytes
    out: dict[str, Any] = {
        stage: {
            "flops": flops[stage],
            "weight_bytes": read[stage],
            "floor_ms": 1e3 * max(flops[stage] / ceilings["flops_per_s"], read[stage] / ceilings["bytes_per_s"]),
        }
        for stage in flops
    }
    return {
        **out,
        "total": {key: sum(row[key] for row in out.values()) for key in ("flops", "weight_bytes", "floor_ms")},
    }


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument, those of a stream one by one."""
    if isinstance(value, Stream):
        yield from value.tensors.values()
    elif isinstance(value, Tensor):
        yield value


def _identity(value: Any) -> Any:
    if isinstance(value, Scratch):
        return None
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors(value)]
    return tuple(found) if found else value

"""Count an inference without running it: every op call with its stage, shapes, FLOP and bytes.

The stages run as they are, on tensors of torch's "meta" device, so a full-size model costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config
from pi0_engine.engine.pipeline import run
from pi0_engine.engine.plan import ShapePlan, Workspace
from pi0_engine.engine.time_terms import TimeTerms
from pi0_engine.engine.weights import pack_weights, shapes_only
from pi0_engine.kernels.gpu.configs import configs_for
from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.gpu.target import Target
from pi0_engine.kernels.registry import Cost, OpFunction, Ops, all_ops, select_ops
from pi0_engine.kernels.stream import Scratch, Stream


@dataclass(frozen=True)
class Call:
    """One op call. ``shapes`` holds the shape and dtype of each tensor argument by position or keyword."""

    stage: str
    op: str
    cost: Cost
    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


class TracingOps(Ops):
    """Looks like :class:`Ops`, records every call in ``calls``, and runs nothing unless it wraps real ``ops``."""

    def __init__(self, ops: Ops | None = None) -> None:
        super().__init__({name: self._recording(name, ops) for name in all_ops()}, ops.choices if ops else ())
        self.calls: list[Call] = []
        self._unstaged = 0

    def lap(self, stage: str) -> None:
        """Say that the calls since the last lap belong to ``stage``."""
        fresh = self.calls[self._unstaged :]
        self.calls[self._unstaged :] = [Call(stage, c.op, c.cost, c.shapes) for c in fresh]
        self._unstaged = len(self.calls)

    def _recording(self, name: str, ops: Ops | None) -> OpFunction:
        entry = all_ops()[name]

        def record(*args: Any, **kwargs: Any) -> None:
            named = [(str(i), a) for i, a in enumerate(args)] + list(kwargs.items())
            tensors = [pair for name, value in named for pair in _tensors(name, value)]
            shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)
            self.calls.append(Call("", name, entry.cost(*args, **kwargs), shapes))
            if ops is not None:
                getattr(ops, name)(*args, **kwargs)

        return record


def count_work(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype) -> list[Call]:
    """Every op call of one inference of these lengths, in order."""
    tracer = TracingOps()
    run_on_meta(tracer, config, plan, dtype, tracer.lap)
    return tracer.calls


def record_launches(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, target: Target) -> list[Launch]:
    """Every kernel launch of one inference of these lengths on a GPU, in order, with its shipped configuration."""
    launches: list[Launch] = []
    configs, _ = configs_for(target.arch)
    ops = select_ops("triton", torch.device("meta"), Launcher(target, configs, launches.append))
    run_on_meta(ops, config, plan, dtype, lambda stage: None)
    return launches


def run_on_meta(ops: Ops, config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, lap: Callable[[str], None]) -> None:
    """Call ``ops`` as one inference of these lengths does, on tensors without contents."""
    source, meta = shapes_only(config), torch.device("meta")
    weights = pack_weights(source, dtype, meta)
    time_terms = TimeTerms(source, weights.expert, meta, solver=plan.solver)
    steps = time_terms(plan.num_steps, per_token=plan.per_token_time)
    scratch = Scratch.allocate(meta, needed=True)
    run(ops, config, weights, steps, Workspace(config, plan, dtype, meta, scratch), lap)


def work_per_stage(calls: list[Call]) -> Mapping[str, Cost]:
    """Total cost of each stage that made a call."""
    totals: dict[str, Cost] = {}
    for call in calls:
        totals[call.stage] = totals.get(call.stage, Cost(0, 0)) + call.cost
    return totals


def _tensors(name: str, value: object) -> list[tuple[str, Tensor]]:
    """A tensor argument, or the parts of a stream as ``NAME.PART``."""
    if isinstance(value, Stream):
        return [(f"{name}.{part}", tensor) for part, tensor in value.tensors.items()]
    return [(name, value)] if isinstance(value, Tensor) else []

"""What there is to tune: the configurations that inferences of given lengths ask for, and the op calls that do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pi0_engine.config import Pi0Config
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs
from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.gpu.target import Target
from pi0_engine.kernels.registry import select_ops
from pi0_engine.kernels.stream import Stream
from pi0_engine.measuring.op_calls import OpCall, distinct, record_op_calls
from pi0_engine.measuring.tuning.candidates import ATTENTION, FUSED_UP, Problem

#: A case that several shapes share is measured on those which make up most of its calls.
_MOST_SHAPES = 3


@dataclass
class Case:
    """The problems that one rule answers, and the op calls that pose them.

    Attributes:
        n: None in attention: the number of keys changes with the prompt, so one rule serves all.
        calls: distinct ones with how often each is made in the inferences tuned for.
    """

    op: str
    rows: int
    n: int | None
    k: int
    problem: Problem
    calls: list[tuple[OpCall, int]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int, int]:
        return self.op, self.rows, self.n or 0, self.k

    @property
    def count(self) -> int:
        return sum(count for _, count in self.calls)

    @property
    def label(self) -> str:
        return f"{self.op} {self.rows}x{'any' if self.n is None else self.n}x{self.k}"


class _Requests(Launcher):
    """Notes which configurations are asked for, and launches nothing."""

    def __init__(self, target: Target, configs: LaunchConfigs) -> None:
        super().__init__(target, configs, execute=_nothing)
        self.asked: list[tuple[str, int, int, int]] = []

    def config(self, op: str, *, rows: int, n: int, k: int, dtype: torch.dtype | None = None) -> LaunchConfig:
        self.asked.append((op, rows, n, k))
        return super().config(op, rows=rows, n=n, k=k, dtype=dtype)


def find_cases(
    config: Pi0Config, plans: Sequence[ShapePlan], dtype: torch.dtype, target: Target, base: LaunchConfigs
) -> list[Case]:
    """Every case of inferences with these lengths, by asking the kernels' launch code on tensors without contents."""
    recorded = distinct(call for plan in plans for call in record_op_calls(config, plan, dtype))
    launcher = _Requests(target, base)
    ops = select_ops("triton", torch.device("meta"), launcher)
    cases: dict[tuple[Any, ...], Case] = {}
    for call, count in recorded:
        launcher.asked.clear()
        getattr(ops, call.op)(**call.arguments)
        for op, rows, n, k in launcher.asked:
            fixed_n = None if op in ATTENTION else n
            problem = _problem(op, rows, n, k, call)
            case = cases.setdefault((op, rows, fixed_n, k), Case(op, rows, fixed_n, k, problem))
            case.calls.append((call, count))
            if n * problem.instances > case.problem.n * case.problem.instances:
                case.problem = problem
    for case in cases.values():
        case.calls = sorted(case.calls, key=lambda entry: -entry[1])[:_MOST_SHAPES]
    return list(cases.values())


def _problem(op: str, rows: int, n: int, k: int, call: OpCall) -> Problem:
    # The hidden values between the halves of an MLP are no stream, whatever the op ends with.
    outputs = [call.arguments.get("out"), call.arguments.get("residual")]
    writes_stream = op != FUSED_UP and any(isinstance(value, Stream) for value in outputs)
    instances = max(1, round(call.call.cost.flops / (4 * rows * n * k))) if op in ATTENTION else 1
    size = torch.empty(0, dtype=call.operand_dtype).element_size()
    return Problem(op, rows, n, k, instances, size, writes_stream)


def _nothing(launch: Launch) -> None:
    """Takes a launch and does not run it."""

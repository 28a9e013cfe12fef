"""How long op calls take: back to back on their own, or one by one while an inference runs."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from pi0_engine.engine.graph import CapturedGraph
from pi0_engine.kernels.registry import OpFunction, Ops, all_ops


def call_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 10) -> list[float]:
    """Time per call of ``calls``, run one after another: one number for each repetition, after one to warm up.

    On a GPU they are captured in a CUDA graph. Its replay needs no host, so that kernels follow each other as closely
    as in the engine's own graph, and the time is the GPU's.
    """

    def run_all() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        seconds = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            run_all()
            seconds.append((time.perf_counter() - started) / len(calls))
        return seconds[1:]
    with torch.cuda.device(device):
        graph = CapturedGraph(run_all)
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(1 + repeats)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize(device)
    return [1e-3 * begin.elapsed_time(end) / len(calls) for begin, end in itertools.pairwise(marks)]


class ClockedOps(Ops):
    """Real ops that time each of their calls: with events on a GPU, where nothing waits, else with the host's clock."""

    def __init__(self, ops: Ops, device: torch.device) -> None:
        super().__init__(
            {name: functools.partial(self._clocked, getattr(ops, name)) for name in all_ops()},
            ops.choices,
            ops.launcher,
        )
        self._ops, self._device = ops, device
        self._marks: list[tuple[Any, Any]] = []

    def range(self, name: str) -> AbstractContextManager[Any]:
        return self._ops.range(name)

    def take_seconds(self) -> list[float]:
        """Of the calls since the last time, in order; waits for the GPU."""
        marks, self._marks = self._marks, []
        if self._device.type != "cuda":
            return [end - begin for begin, end in marks]
        torch.cuda.synchronize(self._device)
        return [1e-3 * begin.elapsed_time(end) for begin, end in marks]

    def _clocked(self, function: OpFunction, *args: Any, **kwargs: Any) -> None:
        begin = self._now()
        function(*args, **kwargs)
        self._marks.append((begin, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

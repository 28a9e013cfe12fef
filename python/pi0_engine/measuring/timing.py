"""How long things take on a device: calls back to back on their own, or one by one while an inference runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from pi0_engine.engine.graph import CapturedGraph
from pi0_engine.kernels.registry import OpFunction, Ops, all_ops

#: The last cache of a GPU of which torch does not say how large it is: more than most have.
_UNKNOWN_CACHE = 64 << 20


def l2_bytes(device: torch.device) -> int:
    """The GPU's last cache; 0 on a CPU, whose timings do not ask for cold weights."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _UNKNOWN_CACHE


def as_one(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """What makes all calls, one after another, each time it is called.

    On a GPU they are captured in a CUDA graph. Its replay needs no host, so that kernels follow each other as closely
    as in the engine's own graph. Each call runs once before, so that nothing is compiled under capture.
    """

    @torch.inference_mode()
    def run_all() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run_all
    with torch.cuda.device(device):
        return CapturedGraph(run_all).replay


def run_seconds(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    *,
    before: Callable[[], object] | None = None,
    warmup: int = 1,
) -> list[float]:
    """Time of each of ``repeats`` calls of ``run``, after some to warm up.

    On a GPU ``run`` enqueues work on the current stream, and the time is the GPU's, by its own events.

    Args:
        before: does or enqueues what each call needs, and is not timed.
    """
    prepare = before or _nothing
    if device.type != "cuda":
        seconds = []
        for _ in range(warmup + repeats):
            prepare()
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return seconds[warmup:]
    with torch.cuda.device(device):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warmup + repeats)]
        for begin, end in pairs:
            prepare()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
    return [1e-3 * begin.elapsed_time(end) for begin, end in pairs[warmup:]]


def call_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 10) -> list[float]:
    """Time per call of ``calls``, run one after another: one number for each repetition, after one to warm up."""
    return [seconds / len(calls) for seconds in run_seconds(as_one(calls, device), device, repeats)]


def _nothing() -> None:
    pass


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

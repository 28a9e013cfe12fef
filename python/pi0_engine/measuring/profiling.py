"""Where the time of an inference goes: each op's calls, launches, work and time, against what this machine could do.

On a CPU every call is timed while inferences run. On a GPU that shows the host as well: where kernels are shorter than
it takes to launch one, the GPU waits. There each distinct call is timed once more on its own, many times in a CUDA
graph, with other weights in every call, so that they come from memory and not from the L2 cache.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from tqdm import tqdm

from pi0_engine.engine.pipeline import STAGES
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.runtime import Engine
from pi0_engine.engine.trace import TracingOps
from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.registry import OpFunction, Ops, all_ops, select_ops
from pi0_engine.measuring.benchmark import Workload, describe_machine, measure_ceilings
from pi0_engine.measuring.op_calls import OpCall, fill, record_op_calls, repeated
from pi0_engine.measuring.timing import ClockedOps, call_seconds, l2_bytes

#: Calls in the graph that times one op.
CALLS_AT_ONCE = 20


@dataclasses.dataclass
class OpRow:
    """All calls of one op with the same shapes in one stage.

    Attributes:
        launches: kernels launched; a call of an op that does not use the project's launcher counts as one.
        kernels: of one call: kernel, grid, warps and stages of each launch.
        seconds: of all calls: on a CPU as they ran, on a GPU back to back on their own.
        running_seconds: of all calls as they ran, one by one without a graph.
    """

    stage: str
    op: str
    shape: str
    implementation: str
    calls: int
    launches: int
    kernels: list[dict[str, Any]]
    flops: float
    bytes: float
    floor_seconds: float
    seconds: float
    running_seconds: float

    def report(self, total: float) -> dict[str, Any]:
        """JSON-ready, times in milliseconds."""
        return {
            "stage": self.stage,
            "op": self.op,
            "shape": self.shape,
            "implementation": self.implementation,
            "calls": self.calls,
            "launches": self.launches,
            "ms": 1e3 * self.seconds,
            "running_ms": 1e3 * self.running_seconds,
            "share": self.seconds / total,
            "flops": self.flops,
            "bytes": self.bytes,
            "floor_ms": 1e3 * self.floor_seconds,
            "percent_of_floor": 100 * self.floor_seconds / self.seconds,
            "kernels": self.kernels,
        }


def profile(engine: Engine, work: Workload, *, runs: int, progress: bool = False) -> dict[str, Any]:
    """Everything ``pi0-engine profile`` prints, as JSON-ready data.

    Raises:
        ValueError: fewer than one run, or inputs that the model cannot take.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}, expected at least 1")
    wall = _wall_seconds(engine, work, runs, progress)
    running = _time_each_call(engine, work, runs, progress)
    ceilings = measure_ceilings(engine.dtype, engine.device)
    rows = _rows(engine, work, running, ceilings, progress)
    total = sum(row.seconds for row in rows)
    report: dict[str, Any] = {
        "machine": describe_machine(engine.device),
        "workload": {
            "model": work.config.model_type,
            "views": work.views,
            "prompt_tokens": work.prompt_tokens,
            "horizon": work.horizon,
            "num_steps": work.num_steps,
            "solver": engine.engine_config.solver,
            "samples": work.samples,
        },
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "runs": runs,
        "ceilings": ceilings,
        "ops": [row.report(total) for row in rows],
        "ops_ms": 1e3 * total,
        "floor_ms": 1e3 * sum(row.floor_seconds for row in rows),
        "wall_ms": 1e3 * wall,
    }
    if engine.device.type == "cuda" and engine.use_graph:
        inputs, noise = work.inputs()
        replays = [engine.infer(inputs, noise, num_steps=work.num_steps).seconds["replay"] for _ in range(1 + runs)]
        report["replay_ms"] = 1e3 * statistics.median(replays[1:])
    return report


def plan_of(engine: Engine, work: Workload) -> ShapePlan:
    """The lengths with which the engine serves the workload."""
    return engine.plan(
        views=[work.views],
        prompt_lengths=[work.prompt_tokens],
        samples=work.samples,
        horizon=work.horizon,
        num_steps=work.num_steps,
    )


def write_trace(engine: Engine, work: Workload, path: str) -> None:
    """One inference as a Chrome trace: stages, layers and ops, and what torch and a GPU did for each.

    With a CUDA graph, its replay follows. Open it in https://ui.perfetto.dev or chrome://tracing.
    """
    inputs, noise = work.inputs()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        engine.infer(inputs, noise, num_steps=work.num_steps)  # what is captured is not in the trace
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        with _eagerly(engine, NamedOps(engine.ops)):
            engine.infer(inputs, noise, num_steps=work.num_steps)
        if engine.use_graph:
            with torch.profiler.record_function("graph replay"):
                engine.infer(inputs, noise, num_steps=work.num_steps)
    profiler.export_chrome_trace(path)


class NamedOps(Ops):
    """Real ops, each call and range under its name in torch's profiler."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(
            {name: functools.partial(_named, name, getattr(ops, name)) for name in all_ops()}, ops.choices, ops.launcher
        )

    def range(self, name: str) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.profiler.record_function(name)
        return context


def _named(name: str, function: OpFunction, *args: Any, **kwargs: Any) -> None:
    with torch.profiler.record_function(name):
        function(*args, **kwargs)


class _StagedOps(TracingOps):
    """Records calls with the stage whose range they are in, and runs them."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(ops)
        self._ops = ops

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        with self._ops.range(name):
            yield
        if name in STAGES:
            self.lap(name)


@contextmanager
def _eagerly(engine: Engine, ops: Ops) -> Iterator[None]:
    """The engine without a graph, on other ops."""
    before = engine.ops, engine.use_graph
    engine.ops, engine.use_graph = ops, False
    try:
        yield
    finally:
        engine.ops, engine.use_graph = before


def _wall_seconds(engine: Engine, work: Workload, runs: int, progress: bool) -> float:
    """Of an inference without a graph and without measuring anything in it: the median, after one to warm up."""
    inputs, noise = work.inputs()
    seconds = []
    with _eagerly(engine, engine.ops):
        for _ in tqdm(range(1 + runs), "wall time", disable=not progress, leave=False):
            started = time.perf_counter()
            engine.infer(inputs, noise, num_steps=work.num_steps)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _time_each_call(engine: Engine, work: Workload, runs: int, progress: bool) -> dict[tuple[Any, ...], float]:
    """Seconds of all calls of each (stage, op, shapes), each call's the median over runs."""
    inputs, noise = work.inputs()
    clock = ClockedOps(engine.ops, engine.device)
    measured: list[list[float]] = []
    calls = []
    for _ in tqdm(range(1 + runs), "each op", disable=not progress, leave=False):
        tracer = _StagedOps(clock)
        with _eagerly(engine, tracer):
            engine.infer(inputs, noise, num_steps=work.num_steps)
        calls = tracer.calls
        measured.append(clock.take_seconds())
    totals: dict[tuple[Any, ...], float] = {}
    for call, seconds in zip(calls, zip(*measured[1:], strict=True), strict=True):
        key = (call.stage, call.op, call.shapes)
        totals[key] = totals.get(key, 0.0) + statistics.median(seconds)
    return totals


def _rows(
    engine: Engine,
    work: Workload,
    running: dict[tuple[Any, ...], float],
    ceilings: dict[str, float],
    progress: bool,
) -> list[OpRow]:
    chosen = {choice.op: choice.implementation for choice in engine.ops.choices}
    groups: dict[tuple[Any, ...], list[OpCall]] = {}
    recorded = record_op_calls(engine.config, plan_of(engine, work), engine.dtype, prompt_tokens=work.prompt_tokens)
    for op_call in recorded:
        groups.setdefault((op_call.call.stage, *op_call.key), []).append(op_call)
    rows = []
    for key, calls in tqdm(groups.items(), "each op alone", disable=not progress, leave=False):
        first, cost = calls[0], calls[0].call.cost
        launches = _launches(engine, first) if chosen[first.op] == "triton" else []
        seconds = running[key]
        if engine.device.type == "cuda":
            seconds = len(calls) * time_alone(engine, first)
        rows.append(
            OpRow(
                stage=first.call.stage,
                op=first.op,
                shape=first.shape,
                implementation=chosen[first.op],
                calls=len(calls),
                launches=len(calls) * max(len(launches), 1),
                kernels=[_describe(launch) for launch in launches],
                flops=len(calls) * cost.flops,
                bytes=len(calls) * cost.bytes,
                floor_seconds=len(calls)
                * max(cost.flops / ceilings["flops_per_s"], cost.bytes / ceilings["bytes_per_s"]),
                seconds=seconds,
                running_seconds=running[key],
            )
        )
    return rows


def time_alone(engine: Engine, call: OpCall) -> float:
    """Seconds per call, back to back on random numbers."""
    arguments = fill(call, engine.device, engine.scratch)
    calls = repeated(getattr(engine.ops, call.op), arguments, CALLS_AT_ONCE, l2_bytes(engine.device))
    return statistics.median(call_seconds(calls, engine.device))


def _launches(engine: Engine, call: OpCall) -> list[Launch]:
    """What one call launches: on tensors without contents, so that nothing runs."""
    recorded: list[Launch] = []
    used = engine.ops.launcher
    assert used is not None
    launcher = Launcher(used.target, used.configs, recorded.append, concurrent=used.concurrent)
    getattr(select_ops("triton", torch.device("meta"), launcher), call.op)(**call.arguments)
    return recorded


def _describe(launch: Launch) -> dict[str, Any]:
    return {
        "kernel": launch.kernel.__name__,
        "grid": list(launch.grid),
        "warps": launch.num_warps,
        "stages": launch.num_stages,
    }

"""``pi0-engine profile``: which op takes how long, and how far is it from what this machine could do?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pi0_engine.commands.options import Backend, Dtype, Solver, print_json, show_progress, table
from pi0_engine.config import EngineConfig
from pi0_engine.model_options import ModelOptions

if TYPE_CHECKING:
    from pi0_engine.engine.runtime import Engine
    from pi0_engine.measuring.benchmark import Workload

#: What the columns cannot say for themselves.
_ON_CPU = "ms: all calls of an op as they ran, each call's median over the runs."
_ON_GPU = (
    "ms: all calls of an op, timed back to back in a CUDA graph of their own, weights cold in L2.\n"
    "running: the same calls one by one without a graph: launch gaps are in it wherever the GPU outruns the host."
)


@dataclass(frozen=True)
class Profile:
    """Time every op of an inference: calls, launches, FLOP, bytes, and percent of what this machine could do.

    Ops with the same shapes in the same stage share a row. docs/profiling.md says how to read it, and which command
    lines of NVIDIA's profilers go with it. Example:

        pi0-engine profile --config pi0 --random-weights 0 --device cuda --plot roofline.png --trace trace.json
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    views: int = 2
    """Cameras present, 1 to 4."""
    prompt_tokens: int = 20
    """Length of the instruction in tokens."""
    horizon: int | None = None
    """Actions per chunk; the model's (50) where not given."""
    num_steps: int | None = None
    """Flow steps; the model's (10) where not given."""
    solver: Solver = "euler"
    """Of the flow: 'midpoint' calls the network twice per flow step, the others once (docs/solvers.md)."""
    samples: int = 1
    """Candidate chunks from one prefix."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "auto"
    backend: Backend = "auto"
    launch_configs: str | None = None
    """Launch configurations that `pi0-engine tune` wrote, instead of those shipped."""
    nvtx: bool = False
    """Mark stages, layers and ops for NVIDIA's profilers."""
    runs: int = 10
    """Inferences measured, after one to warm up."""
    trace: str | None = None
    """Write a Chrome trace of one inference into this .json or .json.gz."""
    plot: str | None = None
    """Draw the roofline into this .png, .svg or .pdf."""
    graph_dot: str | None = None
    """Write the CUDA graph for Graphviz into this .dot and print what its nodes are. Needs a GPU."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        if self.graph_dot and self.device != "cuda":
            raise ValueError(f"--graph-dot writes a CUDA graph, and --device {self.device} has none: use --device cuda")
        from pi0_engine.engine.graph import summarize
        from pi0_engine.measuring.profiling import plan_of, profile, write_trace

        engine, work = self._engine()
        report = profile(engine, work, runs=self.runs, progress=show_progress(self.json))
        if self.trace:
            write_trace(engine, work, self.trace)
        if self.graph_dot:
            graph = engine.graph(plan_of(engine, work))
            graph.write_dot(self.graph_dot)
            report["graph"] = summarize(graph.nodes())
        if self.plot:
            _plot(report, self.plot)
        if self.json:
            print_json(report)
        else:
            print(_text(report))
        return 0

    def _engine(self) -> tuple[Engine, Workload]:
        from pi0_engine.engine.choices import resolve_device, resolve_dtype
        from pi0_engine.engine.runtime import Engine
        from pi0_engine.measuring.benchmark import Workload

        dtype, _ = resolve_dtype(self.dtype, resolve_device(self.device))
        checkpoint = self.model.open(dtype=dtype)
        config = checkpoint.config
        work = Workload(
            config,
            views=self.views,
            prompt_tokens=self.prompt_tokens,
            horizon=config.action_horizon if self.horizon is None else self.horizon,
            num_steps=config.num_steps if self.num_steps is None else self.num_steps,
            seed=self.model.random_weights or 0,
            samples=self.samples,
        )
        engine_config = EngineConfig(
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
            launch_configs=self.launch_configs,
            nvtx=self.nvtx,
            solver=self.solver,
        )
        return Engine(checkpoint, engine_config, progress=show_progress(self.json)), work


def _text(report: dict[str, Any]) -> str:
    on_gpu = report["device"] != "cpu"
    header = ["stage", "op", "shape", "calls", "launches", "ms", "share", "GFLOP", "MB", "floor ms", "of floor"]
    rows = [
        [
            op["stage"],
            op["op"],
            op["shape"],
            str(op["calls"]),
            str(op["launches"]),
            f"{op['ms']:.3f}",
            f"{100 * op['share']:.1f} %",
            f"{op['flops'] / 1e9:.4g}",
            f"{op['bytes'] / 1e6:.4g}",
            f"{op['floor_ms']:.3f}",
            f"{op['percent_of_floor']:.0f} %",
            *([f"{op['running_ms']:.3f}"] if on_gpu else []),
        ]
        for op in report["ops"]
    ]
    machine, ceilings, work = report["machine"], report["ceilings"], report["workload"]
    implementations = sorted({op["implementation"] for op in report["ops"]})
    lines = [
        f"{work['model']}, {report['dtype']}, {work['views']} views, prompt {work['prompt_tokens']}, "
        f"chunk {work['horizon']}, {work['samples']} samples, {work['num_steps']} steps ({work['solver']}), "
        f"{report['runs']} runs",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, ops by "
        f"{', '.join(implementations)}: measured {ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"{ceilings['bytes_per_s'] / 1e9:.1f} GB/s",
        "",
        table([*header, *(["running ms"] if on_gpu else [])], rows, left=3),
        "",
        _ON_GPU if on_gpu else _ON_CPU,
        f"all ops {report['ops_ms']:.2f} ms, their floor {report['floor_ms']:.2f} ms; an inference without a graph "
        f"{report['wall_ms']:.2f} ms" + (f", its graph {report['replay_ms']:.2f} ms" if "replay_ms" in report else ""),
    ]
    if "graph" in report:
        lines += ["", _graph_text(report["graph"])]
    return "\n".join(lines)


def _graph_text(graph: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in graph["kinds"].items())
    kernels = sorted(graph["kernels"].items(), key=lambda item: -item[1]["launches"])
    rows = [[name, str(kernel["launches"]), str(len(kernel["grids"]))] for name, kernel in kernels]
    return f"{graph['nodes']} graph nodes: {kinds}\n" + table(["kernel", "launches", "grids"], rows)


def _plot(report: dict[str, Any], path: str) -> None:
    from pi0_engine.measuring.plots import plot_roofline

    work: dict[tuple[str, str], list[float]] = {}
    for op in report["ops"]:
        total = work.setdefault((op["stage"], op["op"]), [0.0, 0.0, 0.0])
        for index, value in enumerate((op["flops"], op["bytes"], 1e-3 * op["ms"])):
            total[index] += value
    points: dict[str, list[tuple[str, float, float]]] = {}
    for (stage, name), (flops, moved, seconds) in work.items():
        if flops:  # an op that only moves data has no place on a roofline
            points.setdefault(stage, []).append((name, flops / moved, flops / seconds))
    ceilings, sizes = report["ceilings"], report["workload"]
    title = f"{sizes['model']}, {report['dtype']}, {sizes['views']} views: {report['machine']['device']}"
    plot_roofline(path, points, ceilings["flops_per_s"], ceilings["bytes_per_s"], title)

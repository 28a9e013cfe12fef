"""``pi0-engine bench``: how fast is it here, and how far from what this machine could do?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pi0_engine.commands.options import Attention, Backend, Dtype, Solver, print_json, show_progress, table
from pi0_engine.config import EngineConfig, Pi0Config


@dataclass(frozen=True)
class Bench:
    """Time the engine per stage on random weights, against the machine's floor and the reference.

    The engine's actions are compared with the reference's before the reference is timed. A full-size model needs
    about 8 GB in bfloat16 and 14 GB in float32; drawing its weights takes about half a minute. Example:

        pi0-engine bench --config pi0 --views 2 --prompt-tokens 12 --dtype bfloat16 --baseline reference --runs 3
    """

    config: str = "pi0"
    """'pi0', 'pi05' or a JSON file of sizes."""
    random_weights: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0
    """Seed of the weights, images, prompt and noise."""
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
    dtype: Dtype = "auto"
    """'auto' is bfloat16, unless a processor multiplies float32 clearly faster (`pi0-engine env` says how fast)."""
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Backend = "auto"
    attention: Attention = "auto"
    """Of vision and prefix, where it is to be another implementation than the backend's: flash_attn, for one."""
    cuda_graph: bool = True
    """On a GPU: replay one graph. Without it (--no-cuda-graph) every stage is timed by itself."""
    launch_configs: str | None = None
    """Launch configurations that `pi0-engine tune` wrote, instead of those shipped."""
    baseline: Literal["reference", "unwidened"] | None = None
    """Also time the plain PyTorch reference, which computes every camera slot and all padding; or, on a CPU, this
    engine in bfloat16 by the processor's own instructions, even where widening the weights to float32 is faster."""
    layers: bool = False
    """Instead of the stages: engine, pre- and post-processing, policy and websocket round trip, for an ALOHA with up to
    three 224 x 224 cameras, and what the server costs beyond the engine."""
    runs: int = 10
    """Timed runs, after one to warm up (--layers: five)."""
    json: bool = False
    """Print one JSON object instead of text."""
    plot: str | None = None
    """Draw the stages into this .png, .svg or .pdf."""

    def run(self) -> int:
        config = Pi0Config.load(self.config)
        engine = EngineConfig(
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
            attention=self.attention,
            use_cuda_graph=self.cuda_graph,
            launch_configs=self.launch_configs,
            solver=self.solver,
        )
        if self.layers:
            return self._layers(config, engine)
        from pi0_engine.measuring.benchmark import Workload, run_benchmark

        work = Workload(
            config,
            views=self.views,
            prompt_tokens=self.prompt_tokens,
            horizon=config.action_horizon if self.horizon is None else self.horizon,
            num_steps=config.num_steps if self.num_steps is None else self.num_steps,
            seed=self.random_weights,
        )
        report = run_benchmark(
            work,
            engine,
            runs=self.runs,
            baseline=self.baseline,
            progress=show_progress(self.json),
        )
        if self.json:
            print_json(report)
        else:
            print(_text(report))
        if self.plot:
            _plot(report, self.plot)
        return 0

    def _layers(self, config: Pi0Config, engine: EngineConfig) -> int:
        of_the_stages = ("prompt_tokens", "horizon", "num_steps", "baseline", "plot")
        given = [name for name in of_the_stages if getattr(self, name) != Bench.__dataclass_fields__[name].default]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--layers knows no {options}: it takes the sizes and the flow steps of --config")
        from pi0_engine.measuring.serving_layers import measure_shells

        report = measure_shells(
            config,
            engine,
            views=self.views,
            runs=self.runs,
            seed=self.random_weights,
            progress=show_progress(self.json),
        )
        if self.json:
            print_json(report)
        else:
            print(_layers_text(report))
        return 0


def _layers_text(report: dict[str, Any]) -> str:
    seen, beyond, echo = report["observation"], report["beyond_engine"], report["echo"]
    rows = [[shell, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"] for shell, row in report["shells"].items()]
    return "\n".join(
        [
            f"{report['model']}, {report['dtype']}, {seen['views']} cameras of {seen['side']} x {seen['side']} "
            f"({seen['message_bytes'] / 1e6:.2f} MB), {report['runs']} runs on {report['machine']['device']}",
            "",
            table(["shell", "p50 ms", "p99 ms"], rows),
            "",
            f"round trip beyond the engine, request by request: {beyond['p50_ms']:.2f} ms (p50), "
            f"{beyond['p99_ms']:.2f} ms (p99)",
            f"an echo of the same bytes without a server: {echo['p50_ms']:.2f} ms (p50), {echo['p99_ms']:.2f} ms (p99)",
        ]
    )


def _text(report: dict[str, Any]) -> str:
    rows = []
    for stage, row in report["engine"].items():
        floor = f"{row['floor_ms']:.2f}" if "floor_ms" in row else "-"
        percent = f"{row['percent_of_floor']:.0f} %" if "percent_of_floor" in row else "-"
        rows.append([stage, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", floor, percent])
    if "baseline" in report:
        baseline = report["baseline"]
        rows.append([baseline["name"], f"{baseline['p50_ms']:.2f}", f"{baseline['p99_ms']:.2f}", "", ""])
    machine, ceilings, work = report["machine"], report["ceilings"], report["workload"]
    lines = [
        f"{work['model']}, {report['dtype']}, {work['views']} views, prompt {work['prompt_tokens']}, "
        f"chunk {work['horizon']}, {work['num_steps']} steps ({work['solver']}), {report['runs']} runs",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}: measured "
        f"{ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s, {ceilings['bytes_per_s'] / 1e9:.1f} GB/s",
        "",
        table(["stage", "p50 ms", "p99 ms", "floor ms", "of floor"], rows),
        "",
        f"peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB "
        f"(packed weights {report['packed_weight_bytes'] / 1e9:.2f} GB)",
    ]
    if "baseline" in report:
        baseline = report["baseline"]
        against = "bfloat16 multiplied as it is"
        if baseline["name"] == "reference":
            against = f"the reference on its {baseline['prefix_tokens']} prefix tokens"
        lines.append(f"{report['speedup']:.2f}x {against}; actions agree to {baseline['rel_l2']:.1e} (relative L2)")
    return "\n".join(lines)


def _plot(report: dict[str, Any], path: str) -> None:
    from pi0_engine.measuring.plots import plot_stages

    timed = {stage: row for stage, row in report["engine"].items() if "floor_ms" in row}
    series = {
        "engine": [row["p50_ms"] for row in timed.values()],
        "floor of this machine": [row["floor_ms"] for row in timed.values()],
    }
    stages = list(timed)
    if "baseline" in report:
        stages.append(report["baseline"]["name"])
        series["engine"].append(report["baseline"]["p50_ms"])
        series["floor of this machine"].append(0.0)
    plot_stages(path, stages, series, f"{report['machine']['device']}, {report['dtype']}")

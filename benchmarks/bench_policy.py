"""A whole inference: the engine against the project's reference, as it is and under torch.compile.

    python benchmarks/bench_policy.py --config pi0 --views 1 2 3 --prompt-tokens 20

Verified first, then timed. One JSON file (schema: benchmarks/README.md) that is written again after every figure; parts
run in the order engine, eager, compiled, so that a compilation that is cut off costs nothing else. ``--parts compiled``
adds to a file that is there.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baseline import Baseline, compile_counters, wall_times
from floors import stage_floors
from harness import DrawnWeights, clocks, describe_environment, quantiles, result_path, write_json
from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.engine.choices import resolve_device
from pi0_engine.engine.graph import summarize
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.runtime import Engine
from pi0_engine.measuring.benchmark import AGREEMENT, Workload, measure_ceilings, peak_memory
from pi0_engine.measuring.cases import Difference
from pi0_engine.measuring.timing import run_seconds
from pi0_engine.reference.model import Pi0Reference
from tables import policy_table

PARTS = ("engine", "eager", "compiled")
#: The two graphs that an inference can be cut into -> the stages that each runs.
HALVES = {"observe": ("vision", "prefix"), "sample": ("flow",)}


class PolicyBench:
    """Everything that is measured goes into ``report``, and from there into a file at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = Pi0Config.load(options.config)
        self.device, self.dtype = resolve_device(options.device), getattr(torch, options.dtype)
        self.horizon = options.horizon or self.config.action_horizon
        self.num_steps = options.num_steps or self.config.num_steps
        self.path = result_path(options.output, self.device, self.config.model_type, self.dtype)
        self.failures: list[str] = []
        self.report: dict[str, Any] = self._begin()
        print("drawing weights", flush=True)
        self.weights = DrawnWeights(self.config, options.seed, self.dtype)

    def run(self) -> int:
        expected = self._expected_actions()
        if "engine" in self.options.parts:
            self._try("engine", self._measure_engine, expected)
        for part in ("eager", "compiled"):
            if part in self.options.parts:
                self._try(part, self._measure_baseline, part, expected)
        self.report["clocks_after"] = clocks()
        self._save()
        print(policy_table(self.report))
        for failure in self.failures:
            print(f"FAILED: {failure}")
        return 1 if self.failures else 0

    def _begin(self) -> dict[str, Any]:
        workload = {
            "model": self.config.model_type,
            "full_size": self.config == Pi0Config(self.config.model_type),
            "prompt_tokens": self.options.prompt_tokens,
            "horizon": self.horizon,
            "num_steps": self.num_steps,
            "seed": self.options.seed,
        }
        environment = describe_environment(self.device)
        if "engine" not in self.options.parts and self.path.exists():
            report = json.loads(self.path.read_text())
            before = {key: report["environment"][key] for key in ("device", "torch", "commit")}
            now = {key: environment[key] for key in before}
            if report["workload"] != workload or before != now:
                raise ValueError(f"{self.path} is of another run: {report['workload']}, {before}; this is {now}")
            return report
        return {
            "kind": "policy",
            "environment": environment,
            "workload": workload,
            "dtype": self.options.dtype,
            "clocks_before": clocks(),
            "views": {str(views): {} for views in self.options.views},
        }

    def _work(self, views: int) -> Workload:
        return Workload(self.config, views, self.options.prompt_tokens, self.horizon, self.num_steps, self.options.seed)

    def _row(self, views: int) -> dict[str, Any]:
        return self.report["views"].setdefault(str(views), {})

    def _model(self) -> Pi0Reference:
        return Pi0Reference.from_tensors(self.config, self.weights.tensor, self.dtype).to(self.device)

    def _expected_actions(self) -> dict[int, Tensor]:
        """The reference's, float32 [1, H, A] on the CPU, by number of views."""
        print("reference actions to verify against", flush=True)
        baseline, out = Baseline(self._model(), None), {}
        for views in self.options.views:
            inputs, noise = self._work(views).inputs()
            out[views] = baseline.prepare(inputs, noise[0], self.num_steps)().cpu()
        del baseline
        self._release()
        return out

    def _measure_engine(self, expected: dict[int, Tensor]) -> None:
        free_before = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        started = time.perf_counter()
        settings = EngineConfig(device=self.options.device, dtype=self.options.dtype)
        engine = Engine(self.weights, settings)
        inputs, noise = self._work(self.options.views[0]).inputs()
        engine.infer(inputs, noise, num_steps=self.num_steps)
        self.report["load_to_first_action_s"] = time.perf_counter() - started
        self.report["packed_weight_bytes"] = engine.weights.packed_bytes
        self.report["ops"] = {choice.op: choice.implementation for choice in engine.ops.choices}
        for views in self.options.views:
            print(f"engine, {views} views", flush=True)
            self._try(f"engine, {views} views", self._engine_row, engine, views, expected[views])
        self.report["peak_memory_bytes"] = peak_memory(self.device)
        if self.device.type == "cuda":
            self.report["device_memory_bytes"] = free_before - torch.cuda.mem_get_info(self.device)[0]
        self._try("halves", self._halves, engine)
        del engine
        self._release()
        self.report["ceilings"] = measure_ceilings(self.dtype, self.device)
        self._floors()

    def _engine_row(self, engine: Engine, views: int, expected: Tensor) -> None:
        row, (inputs, noise) = self._row(views), self._work(views).inputs()
        actions = engine.infer(inputs, noise, num_steps=self.num_steps).actions[:, 0]
        self._verify(row, f"engine, {views} views", actions, expected)
        if engine.use_graph:
            plan = self._plan(engine, views)
            graph = engine.graph(plan)
            row["replay"] = self._replays(engine, plan, "infer", noise)
            row["graph"] = self._nodes(graph, plan)
            self._save()

        def infer() -> Any:
            return engine.infer(inputs, noise, num_steps=self.num_steps).actions.numpy()

        row["wall"] = quantiles(wall_times(infer, self.device, self.options.replays))
        self._save()
        again = engine.infer(inputs, noise, num_steps=self.num_steps).actions[:, 0]
        if not torch.equal(again, actions):
            raise ValueError(f"the same inputs gave other actions after {self.options.replays} replays")

    def _replays(self, engine: Engine, plan: ShapePlan, part: str, noise: Tensor) -> dict[str, float]:
        """Replays as the GPU times them, each from the same noise: a replay leaves actions where the noise was."""
        actions = engine.session(plan).space["actions"]
        start = noise.flatten(0, 2).to(actions.device)
        replay = engine.graph(plan, part).replay
        with torch.inference_mode():
            seconds = run_seconds(
                replay, self.device, self.options.replays, before=lambda: actions.copy_(start), warmup=3
            )
        return quantiles([1e3 * each for each in seconds])

    def _plan(self, engine: Engine | None, views: int) -> ShapePlan:
        """As the engine pads it; without one, exactly the valid tokens."""
        lengths = {"views": [views], "prompt_lengths": [self.options.prompt_tokens]}
        make = functools.partial(ShapePlan.of, self.config) if engine is None else engine.plan
        return make(**lengths, horizon=self.horizon, num_steps=self.num_steps)

    def _nodes(self, graph: Any, plan: ShapePlan) -> dict[str, Any]:
        try:
            if self.options.dot and plan.images == max(self.options.views):
                graph.write_dot(self.options.dot)
            return summarize(graph.nodes())
        except (ValueError, RuntimeError, AttributeError) as error:  # a driver call that another version lacks
            return {"error": f"{type(error).__name__}: {error}"}

    def _halves(self, engine: Engine) -> None:
        """Each half as a graph of its own, after the memory was noted."""
        if not engine.use_graph:
            return
        for views in self.options.views:
            inputs, noise = self._work(views).inputs()
            engine.observe(inputs, horizon=self.horizon, num_steps=self.num_steps)
            engine.sample(noise)
            plan = self._plan(engine, views)
            self._row(views)["halves"] = {half: self._replays(engine, plan, half, noise) for half in HALVES}

    def _floors(self) -> None:
        """Floors of exactly the valid tokens, and what percent of them was reached."""
        for views in self.options.views:
            row = self._row(views)
            plan = self._plan(None, views)
            row["floor"] = floors = stage_floors(self.config, plan, self.dtype, self.report["ceilings"])
            measured = row.get("replay", row.get("wall"))
            if measured:
                row["percent_of_floor"] = 100 * floors["total"]["floor_ms"] / measured["p50_ms"]
            for half, figures in row.get("halves", {}).items():
                floor = sum(floors[stage]["floor_ms"] for stage in HALVES[half])
                figures.update(floor_ms=floor, percent_of_floor=100 * floor / figures["p50_ms"])
        self._save()

    def _measure_baseline(self, part: str, expected: dict[int, Tensor]) -> None:
        compiler = self.options.compiler if part == "compiled" else None
        baseline = Baseline(self._model(), compiler)
        for views in self.options.views:
            print(f"{part}, {views} views", flush=True)
            self._try(f"{part}, {views} views", self._baseline_row, part, baseline, views, expected[views])
        del baseline
        self._release()

    def _baseline_row(self, part: str, baseline: Baseline, views: int, expected: Tensor) -> None:
        inputs, noise = self._work(views).inputs()
        sample = baseline.prepare(inputs, noise[0], self.num_steps)
        started = time.perf_counter()
        actions = sample().cpu()
        first_s = time.perf_counter() - started
        found: dict[str, Any] = {}
        self._verify(found, f"{part}, {views} views", actions, expected)
        for _ in range(3):  # compiled: warm-up, recording of CUDA graphs, first replay
            sample()
        found.update(quantiles(wall_times(sample, self.device, self.options.baseline_runs)), first_s=first_s)
        found["prefix_tokens"] = (
            inputs.image_masks.shape[1] * self.config.vision.num_patches + self.config.token_capacity
        )
        row = self._row(views)
        if part == "compiled":
            found.update(compile_counters(), compiler=self.options.compiler)
        for measured in ("replay", "wall"):
            if measured in row and row.get("verified"):
                found[f"over_engine_{measured}"] = found["p50_ms"] / row[measured]["p50_ms"]
        row[part] = found
        self._save()

    def _verify(self, row: dict[str, Any], what: str, actual: Tensor, expected: Tensor) -> None:
        """Note the difference; too large a one ends the measurement unless it was asked for even then."""
        difference = Difference.between(actual, expected)
        bound = AGREEMENT[self.dtype]
        row.update(rel_l2=difference.rel_l2, verified=bool(difference.rel_l2 <= bound))
        if not row["verified"]:
            message = f"{what}: relative L2 {difference.rel_l2:.2e} to the reference, expected <= {bound:.0e}"
            if not self.options.even_if_wrong:
                raise ValueError(message)
            self.failures.append(message)

    def _try(self, what: str, measure: Callable[..., None], *arguments: Any) -> None:
        """A failure is told in the report, and the next measurement still runs."""
        try:
            measure(*arguments)
        except Exception as error:
            message = f"{what}: {type(error).__name__}: {str(error)[:2000]}"
            self.failures.append(message)
            self.report.setdefault("errors", []).append(message)
            self._save()

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _save(self) -> None:
        write_json(self.path, self.report)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pi0", help="'pi0', 'pi05' or a JSON file of sizes")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--horizon", type=int, help="actions per chunk; the model's (50) where not given")
    parser.add_argument("--num-steps", type=int, help="flow steps; the model's (10) where not given")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images, prompt and noise")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--replays", type=int, default=300, help="timed runs of the engine")
    parser.add_argument("--baseline-runs", type=int, default=30, help="timed runs of the reference")
    parser.add_argument("--compiler", default="max-autotune", help="mode of torch.compile; 'eager' only traces")
    parser.add_argument("--even-if-wrong", action="store_true", help="time an engine that fails its verification")
    parser.add_argument("--dot", help="write the graph with the most views for Graphviz")
    parser.add_argument("--output", type=Path, help="a JSON file, or a folder for one named after the GPU")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(PolicyBench(parse()).run())

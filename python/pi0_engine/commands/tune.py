"""``pi0-engine tune``: measure launch configurations on the GPU at hand and write them."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pi0_engine.commands.options import print_json, show_progress, table
from pi0_engine.config import Pi0Config

if TYPE_CHECKING:
    from pi0_engine.engine.plan import ShapePlan
    from pi0_engine.measuring.tuning.cases import Case
    from pi0_engine.measuring.tuning.search import Outcome


@dataclass(frozen=True)
class Tune:
    """Measure tile sizes and pipelines of every kernel on the GPU at hand, and write the best.

    Each candidate is checked against the op's meaning before it is timed. The written file serves every command that
    takes --launch-configs; in the package's folder kernels/gpu/launch_configs it serves by itself. Example:

        pi0-engine tune --views 1 2 3 --budget-seconds 1200
        pi0-engine bench --device cuda --launch-configs launch_configs_sm_90.json
    """

    config: str = "pi0"
    """'pi0', 'pi05' or a JSON file of sizes."""
    views: tuple[int, ...] = (1, 2, 3)
    """Numbers of cameras to tune for."""
    prompt_tokens: tuple[int, ...] = (20,)
    """Lengths of instructions to tune for; as in the engine they are rounded up to whole buckets."""
    horizon: int | None = None
    """Actions per chunk; the model's (50) where not given."""
    samples: int = 1
    """Candidate chunks from one prefix."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Rules are written for 16 bits; float32 gets smaller tiles of the same rules."""
    op: tuple[str, ...] = ()
    """Only these ops, as they are called in the file of launch configurations."""
    candidates: int = 24
    """Of each problem, beside the present configuration."""
    budget_seconds: float = 900.0
    """When to stop. What takes most time in an inference comes first; what is not reached stays as it is."""
    launch_configs: str | None = None
    """Start from this file instead of the configurations shipped for the GPU."""
    output: str | None = None
    """The file to write; launch_configs_sm_XX.json in the current folder where not given."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        import torch

        from pi0_engine.engine.machine import describe_machine
        from pi0_engine.kernels.gpu.configs import LaunchConfigs, configs_for
        from pi0_engine.kernels.gpu.target import target_of
        from pi0_engine.measuring.tuning.cases import find_cases
        from pi0_engine.measuring.tuning.search import measured_rules, merge_rules, tune

        if self.candidates < 1 or not self.budget_seconds > 0:
            raise ValueError(
                f"candidates is {self.candidates} and budget seconds {self.budget_seconds}: expected more than 0"
            )
        if not torch.cuda.is_available():
            raise ValueError(f"tuning measures on an NVIDIA GPU, and torch {torch.__version__} sees none")
        device = torch.device("cuda", torch.cuda.current_device())
        target = target_of(device)
        base, listed = configs_for(target.arch)
        if self.launch_configs:
            base = LaunchConfigs.load(Path(self.launch_configs))
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        cases = select_cases(find_cases(*self._workload(), dtype, target, base), self.op)
        output = Path(self.output or f"launch_configs_sm_{target.arch}.json")
        outcomes: list[Outcome] = []
        found = tune(
            cases,
            base,
            target,
            device,
            budget_seconds=self.budget_seconds,
            limit=self.candidates,
            progress=show_progress(self.json),
        )
        try:
            for outcome in found:
                outcomes.append(outcome)
                # After each, so that nothing is lost when it is interrupted.
                merge_rules(measured_rules(outcomes, target.name, time.strftime("%Y-%m-%d")), base).save(output)
        except RuntimeError as error:  # a fault of the GPU, after which nothing runs on it
            raise ValueError(f"{error}; {len(outcomes)} of {len(cases)} problems were done before") from error
        report = {
            "device": target.name,
            "arch": target.arch,
            "started_from": self.launch_configs or f"sm_{listed}",
            "dtype": self.dtype,
            "machine": describe_machine(device),
            "output": str(output),
            "cases": [describe(outcome) for outcome in outcomes],
        }
        if self.json:
            print_json(report)
        else:
            print(report_text(report))
        return 0

    def _workload(self) -> tuple[Pi0Config, list[ShapePlan]]:
        from pi0_engine.engine.plan import GPU_PROMPT_BUCKET, ShapePlan

        config = Pi0Config.load(self.config)
        plans = [
            ShapePlan.of(
                config,
                views=[views],
                prompt_lengths=[prompt],
                samples=self.samples,
                horizon=self.horizon,
                prompt_bucket=GPU_PROMPT_BUCKET,
            )
            for views in self.views
            for prompt in self.prompt_tokens
        ]
        if not plans or any(n < 1 for n in (*self.views, *self.prompt_tokens)):
            raise ValueError(f"views {self.views} and prompt tokens {self.prompt_tokens}: expected numbers from 1 on")
        return config, plans


def select_cases(cases: list[Case], ops: tuple[str, ...]) -> list[Case]:
    """Those of the named ops, or all where none is named.

    Raises:
        ValueError: a name that no case has.
    """
    known = {case.op for case in cases}
    unknown = sorted(set(ops) - known)
    if unknown:
        raise ValueError(f"there is nothing to tune for op {unknown}, expected some of {sorted(known)}")
    return [case for case in cases if not ops or case.op in ops]


def describe(outcome: Outcome) -> dict[str, Any]:
    """JSON-ready, times in microseconds."""
    return {
        "case": outcome.case.label,
        "calls": outcome.case.count,
        "present_us": 1e6 * outcome.present_seconds,
        "best_us": 1e6 * outcome.best_seconds,
        "tried": outcome.tried,
        "finished": outcome.finished,
        "present": dataclasses.asdict(outcome.present),
        "best": dataclasses.asdict(outcome.best),
        "dropped": outcome.dropped,
    }


def report_text(report: dict[str, Any]) -> str:
    rows = [
        [
            case["case"],
            str(case["calls"]),
            f"{case['present_us']:.1f}",
            f"{case['best_us']:.1f}",
            str(case["tried"]),
            str(len(case["dropped"])),
            "" if case["finished"] else ("out of time" if case["tried"] else "not reached"),
        ]
        for case in report["cases"]
    ]
    before = sum(case["calls"] * case["present_us"] for case in report["cases"]) / 1e3
    after = sum(case["calls"] * case["best_us"] for case in report["cases"]) / 1e3
    lines = [
        f"{report['device']} (sm_{report['arch']}), {report['dtype']}, from {report['started_from']}",
        "",
        table(["problem", "calls", "was us", "now us", "tried", "dropped", ""], rows),
        "",
        f"all calls {before:.2f} -> {after:.2f} ms; written to {report['output']}",
    ]
    wrong = [f"{case['case']}: {reason}" for case in report["cases"] for reason in case["dropped"] if "wrong" in reason]
    if wrong:
        lines += ["", f"{len(wrong)} candidates gave wrong results and were dropped:", *(f"  {line}" for line in wrong)]
    kept = sum(not case["finished"] for case in report["cases"])
    if kept:
        lines.append(f"{kept} problems were not finished: more with --budget-seconds above the present one")
    return "\n".join(lines)

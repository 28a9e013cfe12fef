"""``pi0-engine eval``: how often the policy does what it is told, in the simulator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pi0_engine.commands.options import Dtype, Solver, print_json, show_progress, table
from pi0_engine.demo.rollout import Execution
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.demo.tasks import TASKS


@dataclass(frozen=True)
class Eval:
    """Let a policy drive the simulated robot, and count.

    Objects and goals lie where they did in no demonstration. Every setting that is run with the same seed meets the
    same scenes and starts from the same noise. Needs the extra `sim`. Example:

        pi0-engine eval --tasks drawer-open,faucet-close --episodes 20 --dtype bfloat16 --num-steps 5
    """

    tasks: str = "all"
    """Names with commas between them, or 'all'."""
    episodes: int = 50
    """Of each task."""
    seed: int = 0
    """Which scenes."""
    checkpoint: str | None = None
    """Of this robot; the one that is shipped where not given."""
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"
    """'reference' is the plain PyTorch model in float32; the others are implementations of the engine."""
    device: str = "cpu"
    dtype: Dtype = "auto"
    num_steps: int | None = None
    """Flow steps; the checkpoint's (10) where not given."""
    solver: Solver = "euler"
    """Of the flow: 'midpoint' calls the network twice per flow step, the others once (docs/solvers.md)."""
    execute: int = 8
    """Control steps from one look at the scene to the next."""
    latency: int = 0
    """Of them, how many pass before the new chunk is there: the robot goes on with the old one."""
    rtc: bool = False
    """Real-time chunking: each chunk continues the one before."""
    processes: int | None = None
    """Episodes at a time; as many as there are processors where not given."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        from pi0_engine.demo.evaluate import Setting, evaluate, summarize

        execution = Execution(execute=self.execute, latency=self.latency, rtc=self.rtc, num_steps=self.num_steps)
        setting = Setting(
            backend=self.backend, device=self.device, dtype=self.dtype, solver=self.solver, execution=execution
        )
        tasks = list(TASKS) if self.tasks == "all" else self.tasks.split(",")
        outcomes = evaluate(
            {"": setting},
            tasks=tasks,
            episodes=self.episodes,
            seed=self.seed,
            checkpoint=self.checkpoint or CHECKPOINT,
            processes=self.processes,
            progress=show_progress(self.json),
        )[""]
        summary = summarize(outcomes)
        if self.json:
            import torch

            from pi0_engine.engine.machine import describe_machine

            machine = describe_machine(torch.device(self.device))
            print_json({"setting": asdict(setting), "seed": self.seed, "machine": machine, **summary})
        else:
            rows = [_row(task, row) for task, row in summary["tasks"].items()]
            print(table(["task", "success", "95 % interval", "steps"], [*rows, _row("all", summary["all"])]))
        return 0


def _row(name: str, summary: dict[str, Any]) -> list[str]:
    steps = "-" if summary["steps"] is None else f"{summary['steps']:.0f}"
    return [
        name,
        f"{summary['successes']}/{summary['episodes']}",
        f"{100 * summary['low']:.0f} to {100 * summary['high']:.0f} %",
        steps,
    ]

"""``pi0-engine simulate``: what a network's latency does to a robot's motion, with and without real-time chunking."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pi0_engine.client.simulation import Conditions, Run, Strategy, simulate
from pi0_engine.commands.options import print_json, table
from pi0_engine.rtc.schedule import RtcConfig, Schedule

#: Seconds that the picture shows: of a whole run the seams would lie too close.
_SHOWN_S = 4.0
_COLUMNS = {
    "inferences": "inferences",
    "held_steps": "held steps",
    "seams": "seams",
    "seam_jump_mean": "mean jump",
    "seam_jump_max": "max jump",
    "largest_step": "largest step",
    "late_ms_mean": "late, ms",
    "stale_actions": "stale",
}


@dataclass(frozen=True)
class Simulate:
    """Compare control loops under latency, jitter and lost answers, in simulated time.

    Three loops execute chunks that change completely from one to the next, the worst case: one that waits for
    every chunk, one that computes the next chunk in the background, and the same with real-time chunking. The table
    tells for each: control steps without an action; at how many seams the next chunk took over, and by how much the
    command of any joint jumped there (rad); the largest change from one control step to the next anywhere; how much
    later than meant actions were executed; and how many were stale, which must be none.
    """

    latency_ms: float = 150.0
    """From an observation to its chunk, on average."""
    jitter_ms: float = 50.0
    """The latency varies by so much in both directions."""
    drop: float = 0.02
    """Probability that an answer is lost."""
    control_hz: float = 50.0
    """Control steps per second."""
    seconds: float = 10.0
    """Of simulated time."""
    seed: int = 0
    """Of latencies, losses and noise: the same seed, the same run."""
    execute: int = 25
    """Actions of each chunk (of 50) that the waiting loop executes."""
    replan_after: int | None = None
    """Begin the next inference when a chunk is so many control steps old; at once where not given."""
    rtc: Literal["guided", "off"] = "guided"
    """'off' leaves the third loop out."""
    schedule: Schedule = "linear"
    """Of real-time chunking, between the delay and the execution horizon."""
    execution_horizon: int = 25
    """Steps that real-time chunking pulls towards the old chunk: more than the latency in control steps."""
    plot: str | None = None
    """Draw the first seconds into this .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        conditions = Conditions(
            latency_ms=self.latency_ms,
            jitter_ms=self.jitter_ms,
            drop=self.drop,
            control_hz=self.control_hz,
            seconds=self.seconds,
            seed=self.seed,
            execute=self.execute,
            replan_after=self.replan_after,
            rtc=RtcConfig(schedule=self.schedule, execution_horizon=self.execution_horizon),
        )
        strategies: list[Strategy] = ["synchronous", "asynchronous"]
        if self.rtc == "guided":
            strategies.append("real-time chunking")
        runs = {strategy: simulate(strategy, conditions) for strategy in strategies}
        summaries = {strategy: run.summary() for strategy, run in runs.items()}
        if self.plot:
            self._draw(self.plot, runs)
        if self.json:
            print_json({"conditions": dataclasses.asdict(conditions), "loops": summaries})
        else:
            cells = [[name, *(_number(summary[key]) for key in _COLUMNS)] for name, summary in summaries.items()]
            print(table(["control loop", *_COLUMNS.values()], cells))
        return int(any(run.stale for run in runs.values()))

    def _draw(self, path: str, runs: dict[Strategy, Run]) -> None:
        from pi0_engine.measuring.plots import plot_seams

        steps = round(min(self.seconds, _SHOWN_S) * self.control_hz)
        shown = {
            f"{name}: {run.held.sum()} of {len(run.held)} steps held, mean jump "
            f"{run.summary()['seam_jump_mean']:.2f} rad at {len(run.seams)} seams": (
                run.commands[:steps],
                run.held[:steps],
                run.seams[run.seams < steps],
            )
            for name, run in runs.items()
        }
        title = (
            f"{self.control_hz:g} Hz, latency {self.latency_ms:g} ± {self.jitter_ms:g} ms, "
            f"{self.drop:.0%} of answers lost; another motion with every chunk"
        )
        plot_seams(path, shown, 1 / self.control_hz, title)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"

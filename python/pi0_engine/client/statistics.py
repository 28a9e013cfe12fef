"""What a control loop did: counted, so that a deployment can be judged by it."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Latencies and jumps that percentiles and means are taken of: the last ones.
_WINDOW = 1000


@dataclass
class Statistics:
    """Counts since the runner was made; resets do not clear them.

    Attributes:
        executed: control steps that executed an action of a chunk.
        limited: of them, how many were brought nearer to the command before, as ``max_velocity`` of the robot's guards
            asks for: at seams.
        held: control steps in an episode for which there was none (a deadline miss).
        waiting: control steps before the first chunk of an episode.
        stopped: control steps after the watchdog had stopped the episode.
        overruns: control steps that came more than half a period late.
        requests: inferences begun.
        accepted: chunks that took over.
        guarded: of them, those that the robot's guards had changed, by ``clip`` or ``hold``.
        discarded: chunks that did not, by reason (``schedule.Discarded``, ``stopped``).
        errors: failed inferences by code or exception.
        latencies_s: of inferences, from the observation to the chunk.
        seam_jumps: largest change of any joint between the last command and the first of a new chunk, robot units.
    """

    executed: int = 0
    limited: int = 0
    held: int = 0
    waiting: int = 0
    stopped: int = 0
    overruns: int = 0
    requests: int = 0
    accepted: int = 0
    guarded: Counter[str] = field(default_factory=Counter)
    discarded: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    seam_jumps: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def steps(self) -> int:
        return self.executed + self.held + self.waiting + self.stopped

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON and logs."""
        counts = ("executed", "limited", "held", "waiting", "stopped", "overruns", "requests", "accepted")
        return {
            "steps": self.steps,
            **{name: getattr(self, name) for name in counts},
            "guarded": dict(self.guarded),
            "discarded": dict(self.discarded),
            "errors": dict(self.errors),
            "latency_ms": {key: 1e3 * value for key, value in summary(self.latencies_s).items()},
            "seam_jump": summary(self.seam_jumps),
        }


def summary(values: deque[float]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum; empty without values."""
    if not values:
        return {}
    p50, p95 = np.percentile(values, [50, 95])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p95": float(p95), "max": float(max(values))}

"""Who knows how each task is done: Meta-World's scripted policies, and one of our own around the pillar."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.demo.tasks import Task

#: The way around the pillar: so far to the side (m), turning inwards behind this y (m).
_DETOUR_X, _BEHIND_Y = 0.16, 0.79
#: Hand speed per metre to go.
_GAIN = 10.0


class Expert:
    """Demonstrates one episode, from the simulator's full knowledge.

    Args:
        task: which one.
        rng: decides what is left open: the side on which the pillar is passed.

    Attributes:
        side: -1 or 1, the sign of x when the pillar is passed.
    """

    def __init__(self, task: Task, rng: np.random.Generator) -> None:
        self.side = int(rng.choice([-1, 1]))
        self._policy: Any = None
        if not task.obstacle:
            from metaworld import policies

            title = "".join(part.capitalize() for part in task.environment.split("-"))
            self._policy = getattr(policies, f"Sawyer{title}V3Policy")()

    def action(self, told: NDArray[np.float64]) -> NDArray[np.float64]:
        """What to do now, float64 [4] in [-1, 1], given Meta-World's observation [39] with the goal in it."""
        if self._policy is not None:
            return np.clip(np.asarray(self._policy.get_action(told), dtype=np.float64), -1.0, 1.0)
        hand, goal = told[:3], told[-3:]
        if hand[1] < _BEHIND_Y - 0.03:
            beside = self.side * hand[0] > _DETOUR_X - 0.04
            towards = np.array([self.side * _DETOUR_X, _BEHIND_Y if beside else 0.66, goal[2]])
        else:
            towards = goal
        return np.append(np.clip(_GAIN * (towards - hand), -1.0, 1.0), 0.0)

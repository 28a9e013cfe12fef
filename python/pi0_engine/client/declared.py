"""What a policy says about the robot that it drives: how fast it is stepped, and how fast its commands may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.client.connection import PolicyClient
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.guards import largest_steps


@dataclass(frozen=True)
class Declared:
    """Of a robot's declaration, what concerns a control loop; None where nothing is declared.

    Attributes:
        control_hz: actions per second.
        max_velocity: of the guards: largest change of each action dimension per second, None where it is free.
    """

    control_hz: float | None = None
    max_velocity: tuple[float | None, ...] | None = None

    @classmethod
    def of(cls, policy: Any) -> Declared:
        """What a server's greeting says, or the robot of a policy in this process; other policies declare nothing."""
        if isinstance(policy, PolicyClient):
            if not policy.is_pi0_engine:
                return cls()
            guards, control_hz = policy.metadata.get("guards") or {}, policy.metadata.get("control_hz")
            velocity = guards.get("max_velocity")
            return cls(control_hz, None if velocity is None else tuple(velocity))
        robot = robot_of(policy)
        if robot is None:
            return cls()
        return cls(robot.control_hz, None if robot.guards is None else robot.guards.max_velocity)

    def check_rate(self, control_hz: float) -> None:
        """Raise ValueError for a control loop faster than the robot's: it would execute motions too fast."""
        if self.control_hz is not None and control_hz > self.control_hz * (1 + 1e-6):
            raise ValueError(
                f"control_hz is {control_hz:g}, but the policy's robot is declared with {self.control_hz:g} actions "
                "per second: its motions would be faster than it was taught, and than its guards allow"
            )

    @property
    def max_step(self) -> NDArray[np.float32] | None:
        """float32 [A]: the largest change from one command to the next; infinite where it is free, None if all are."""
        if self.max_velocity is None or self.control_hz is None:
            return None
        return largest_steps(self.max_velocity, self.control_hz, np.float32)


def robot_of(policy: Any) -> Robot | None:
    """The robot of a ``Pi0Policy`` or ``RecordingPolicy``; None of anything else."""
    robot = getattr(policy, "robot", None)
    return robot if isinstance(robot, Robot) else None

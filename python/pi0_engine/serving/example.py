"""An observation that fits a robot's declaration and shows nothing: to warm up, to check, to measure."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi0_engine.robots.declaration import Robot


def example_observation(robot: Robot, *, side: int = 224, seed: int | None = None) -> dict[str, Any]:
    """All cameras with frames of side x side pixels, zeros for the state, an instruction.

    ``seed`` fills frames and state with random values instead.
    """
    random = None if seed is None else np.random.default_rng(seed)
    observation: dict[str, Any] = {robot.prompt_key: robot.prompt or "wait"}
    for camera in robot.cameras:
        shape = (3, side, side) if camera.layout == "chw" else (side, side, 3)
        frame = np.zeros(shape) if random is None else random.integers(0, 256, shape)
        observation[camera.key] = frame.astype(np.uint8)
    for part in robot.state:
        observation[part.key] = np.zeros(part.size) if random is None else random.uniform(-0.5, 0.5, part.size)
    return observation

"""One episode in closed loop: look, draw a chunk of actions, carry out some of them, look again.

Between two looks lie ``execute`` control steps. With a ``latency`` of d steps the robot does not stop while it waits
for an answer: it carries out d further actions of the chunk that it has, and the new chunk takes over at its index d,
whose control step that is.

    chunk of look 0    0 1 2 3 4 5 6 7 8 9 . .           execute 6, latency 4
    chunk of look 1                . . . . 4 5 6 7 8 9 . .
    control step       0 1 2 3 4 5 6 7 8 9 ...
    looks              0           1           2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.demo.scene import ACTION_DIM, Scene
from pi0_engine.rtc.schedule import Leftover

#: An episode that has not succeeded by then has failed. The experts need 30 to 130 control steps.
MOST_STEPS = 200

OnStep = Callable[[Scene, NDArray[np.float64]], None]


class ChunkPolicy(Protocol):
    """What answers observations: a ``Pi0Policy``, or anything else that can be asked in its way."""

    @property
    def config(self) -> Pi0Config: ...

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: NDArray[np.float32],
        num_steps: int | None = None,
        leftover: Leftover | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Execution:
    """How chunks are carried out.

    Attributes:
        execute: control steps from one look to the next.
        latency: of them, how many pass before the new chunk is there.
        rtc: whether the policy is told what is left of the old chunk, to continue it (docs/rtc.md).
        num_steps: flow steps of each chunk; None takes the checkpoint's (10).

    Raises:
        ValueError: numbers that are negative, or that do not go together.
    """

    execute: int = 8
    latency: int = 0
    rtc: bool = False
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.execute < 1 or self.latency < 0:
            given = f"execute is {self.execute} and latency {self.latency} control steps"
            raise ValueError(f"{given}, expected at least 1 and at least 0")
        if self.latency > self.execute:
            raise ValueError(
                f"latency is {self.latency} control steps, expected at most execute ({self.execute}): "
                "one chunk is computed at a time"
            )
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 1")

    def check(self, horizon: int) -> None:
        """Raise ValueError where chunks of ``horizon`` actions are too short."""
        if self.execute + self.latency > horizon:
            raise ValueError(
                f"execute is {self.execute} and latency {self.latency} control steps, "
                f"expected together at most the {horizon} actions of a chunk"
            )


@dataclass(frozen=True)
class Episode:
    """What came of it.

    Attributes:
        task, seed, prompt: which scene it was, and what the policy was asked for.
        success: of the scene's task, whatever the prompt was.
        steps: control steps carried out.
        inferences: chunks computed.
        seam_jump: mean over the seams of the largest change of any action dimension from the last action of one chunk
            to the first of the next; 0 without a seam.
        chunk_ms: mean wall time of an inference, in milliseconds.
    """

    task: str
    seed: int
    prompt: str
    success: bool
    steps: int
    inferences: int
    seam_jump: float
    chunk_ms: float


@dataclass(frozen=True, eq=False)
class Look:
    """One inference of an episode: what was seen, what the policy answered, and at which control step."""

    step: int
    observation: Mapping[str, Any]
    reply: Mapping[str, Any]


def run_episode(
    scene: Scene,
    policy: ChunkPolicy,
    seed: int,
    *,
    prompt: str | None = None,
    execution: Execution | None = None,
    most_steps: int = MOST_STEPS,
    on_look: Callable[[Look], None] | None = None,
    on_step: OnStep | None = None,
) -> Episode:
    """Let a policy drive until the scene's task has succeeded, for ``most_steps`` control steps at most.

    The robot waits for the first chunk. Noise is drawn from ``seed``: every policy that is run with the same seed meets
    the same scene and starts its chunks from the same noise.

    Args:
        scene: is reset to ``seed``.
        prompt: the instruction; the scene's own where not given.
        execution: how chunks are carried out; 8 actions of each, without latency, where not given.
        on_look, on_step: called after every inference, and after every action with the scene and that action.

    Raises:
        ValueError: chunks that are too short for ``execution``; whatever the policy raises.
    """
    execution = execution or Execution()
    horizon, width = policy.config.action_horizon, policy.config.action_dim
    execution.check(horizon)
    rng = np.random.default_rng(seed)
    motion = _Motion(scene, most_steps, on_step)
    seconds: list[float] = []

    def draw(observation: Mapping[str, Any], leftover: Leftover | None = None) -> NDArray[np.float32]:
        noise = rng.standard_normal((horizon, width), dtype=np.float32)
        started = time.perf_counter()
        reply = policy.infer(observation, noise=noise, num_steps=execution.num_steps, leftover=leftover)
        seconds.append(time.perf_counter() - started)
        if on_look is not None:
            on_look(Look(scene.steps, observation, reply))
        chunk: NDArray[np.float32] = reply["actions"]
        return chunk

    first = scene.reset(seed)
    if prompt is not None:
        scene.prompt = first["prompt"] = prompt
    chunk = draw(first)
    motion.carry_out(chunk[: execution.execute])
    while not motion.is_over:
        left = chunk[execution.execute :]
        following = draw(scene.observe(), Leftover(left, execution.latency) if execution.rtc else None)
        motion.carry_out(left[: execution.latency])
        chunk, motion.at_seam = following, True
        motion.carry_out(chunk[execution.latency : execution.execute])
    return Episode(
        task=scene.name,
        seed=seed,
        prompt=scene.prompt,
        success=scene.success,
        steps=scene.steps,
        inferences=len(seconds),
        seam_jump=float(np.mean(motion.jumps)) if motion.jumps else 0.0,
        chunk_ms=1e3 * float(np.mean(seconds)),
    )


class _Motion:
    """What the robot is sent.

    Attributes:
        at_seam: whether the next action is the first of another chunk.
        jumps: at each seam, the largest change of any action dimension.
    """

    def __init__(self, scene: Scene, most_steps: int, on_step: OnStep | None) -> None:
        self._scene, self._most_steps, self._on_step = scene, most_steps, on_step
        self._last = np.zeros(ACTION_DIM)
        self.at_seam, self.jumps = False, list[float]()

    @property
    def is_over(self) -> bool:
        return self._scene.success or self._scene.touched or self._scene.steps >= self._most_steps

    def carry_out(self, actions: NDArray[np.float32]) -> None:
        # Beyond [-1, 1] the robot does not know the difference: there is no jump.
        for action in np.clip(actions.astype(np.float64), -1.0, 1.0):
            if self.is_over:
                return
            if self.at_seam:
                self.jumps.append(float(np.abs(action - self._last).max()))
            self.at_seam, self._last = False, action
            self._scene.step(action)
            if self._on_step is not None:
                self._on_step(self._scene, action)

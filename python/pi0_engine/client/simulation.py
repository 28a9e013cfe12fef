"""What latency does to a robot's motion: control loops in virtual time, around a policy without a network.

Nobody sleeps and nothing is timed: an inference takes as long as the network that is being simulated says. So a run
depends on its seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pi0_engine.client.control import Answer, ChunkControl, Request
from pi0_engine.client.errors import ConnectionLost
from pi0_engine.client.simulated import MODEL, NoisyPolicy, SimulatedRobot, still_policy, two_arms
from pi0_engine.client.sources import LocalSource
from pi0_engine.rtc.schedule import RtcConfig

Strategy = Literal["synchronous", "asynchronous", "real-time chunking"]


@dataclass(frozen=True)
class Conditions:
    """What is simulated.

    Attributes:
        latency_ms: from an observation to its chunk, on average.
        jitter_ms: the latency is uniform within so much of its average; never below 0.
        drop: probability that an answer is lost; that is noticed when it should have been there.
        control_hz: control steps per second.
        seconds: of the run.
        seed: of latencies, losses and the policy's noise.
        execute: actions of each chunk that the synchronous loop executes, as openpi's ``ActionChunkBroker`` does.
        replan_after: of the asynchronous loops; None: the next inference begins when the last has ended.
        rtc: how chunks continue each other.
    """

    latency_ms: float = 150.0
    jitter_ms: float = 50.0
    drop: float = 0.02
    control_hz: float = 50.0
    seconds: float = 10.0
    seed: int = 0
    execute: int = 25
    replan_after: int | None = None
    rtc: RtcConfig = RtcConfig(execution_horizon=25)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        for name in ("latency_ms", "jitter_ms"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected milliseconds, 0 or more")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is {self.drop}, expected a probability")
        if not (0 < self.control_hz < np.inf and 1 <= self.seconds * self.control_hz < 1e6):
            raise ValueError(
                f"control_hz is {self.control_hz} and seconds {self.seconds}, expected 1 to a million control steps"
            )
        if not 1 <= self.execute <= MODEL.action_horizon:
            raise ValueError(f"execute is {self.execute}, expected 1 to {MODEL.action_horizon} actions")

    @property
    def steps(self) -> int:
        return round(self.seconds * self.control_hz)


@dataclass(frozen=True, eq=False)
class Sent:
    """One control step: the command, and where it is from.

    Attributes:
        action: float32 [A], None where nothing was sent.
        held: there was no action for this step.
        chunk: number of the inference that it is of, None where it was held.
        late_s: how much later it is executed than its chunk means it to be.
        stale: of an observation that is older than its chunk is long.
    """

    action: NDArray[np.float32] | None
    held: bool
    chunk: int | None = None
    late_s: float = 0.0
    stale: bool = False


@dataclass(frozen=True, eq=False)
class Run:
    """What a robot was sent, step by step, and what it says about the loop.

    Attributes:
        commands: float32 [steps, A]; NaN where nothing was sent.
        held: bool [steps].
        seams: steps whose command is of another chunk than the last command that was of one.
        jumps: float32 [seams], the largest change of any joint from the command before: rad.
        inferences: how many were begun.
        late_s: float [executed actions].
        stale: actions executed that should not have been.
    """

    commands: NDArray[np.float32]
    held: NDArray[np.bool_]
    seams: NDArray[np.int64]
    jumps: NDArray[np.float32]
    inferences: int
    late_s: NDArray[np.float64]
    stale: int

    @classmethod
    def of(cls, sent: list[Sent], inferences: int) -> Run:
        nothing = np.full(two_arms().action_dim, np.nan, np.float32)
        commands = np.stack([nothing if s.action is None else s.action for s in sent])
        seams, last = [], None
        for step, s in enumerate(sent):
            if s.chunk is not None:
                if last is not None and s.chunk != last:
                    seams.append(step)
                last = s.chunk
        at = np.array(seams, np.int64)
        return cls(
            commands=commands,
            held=np.array([s.held for s in sent]),
            seams=at,
            jumps=np.abs(commands[at] - commands[at - 1]).max(axis=1, initial=0.0),
            inferences=inferences,
            late_s=np.array([s.late_s for s in sent if s.chunk is not None]),
            stale=sum(s.stale for s in sent),
        )

    def summary(self) -> dict[str, float]:
        """Numbers for a table: jumps in rad, lateness in ms."""
        return {
            "inferences": self.inferences,
            "held_steps": int(self.held.sum()),
            "seams": len(self.seams),
            "seam_jump_mean": float(self.jumps.mean()) if self.jumps.size else 0.0,
            "seam_jump_max": float(self.jumps.max(initial=0.0)),
            "largest_step": float(np.nanmax(np.abs(np.diff(self.commands, axis=0)), initial=0.0)),
            "late_ms_mean": 1e3 * float(self.late_s.mean()) if self.late_s.size else 0.0,
            "stale_actions": self.stale,
        }


class Network:
    """How long each inference takes, and whether its answer arrives."""

    def __init__(self, conditions: Conditions) -> None:
        self._conditions, self._rng = conditions, np.random.default_rng([conditions.seed, 2])

    def draw(self) -> tuple[float, bool]:
        """(seconds, whether the answer is lost)."""
        c = self._conditions
        latency_ms = c.latency_ms + c.jitter_ms * self._rng.uniform(-1, 1)
        return 1e-3 * max(0.0, latency_ms), bool(self._rng.random() < c.drop)


def simulate(strategy: Strategy, conditions: Conditions) -> Run:
    """One run of a control loop in virtual time.

    ``synchronous``: openpi's ``ActionChunkBroker``: the loop waits for each chunk, and executes it from its first
    action on. ``asynchronous``: :class:`ChunkRunner`'s loop, chunks by time stamp. ``real-time chunking``: the same,
    and each chunk continues the one before.
    """
    policy = NoisyPolicy(still_policy(conditions.rtc), conditions.seed)
    robot = SimulatedRobot()
    if strategy == "synchronous":
        return _synchronous(conditions, policy, robot)
    return _asynchronous(conditions, LocalSource(policy, rtc=strategy == "real-time chunking"), robot)


def _synchronous(conditions: Conditions, policy: NoisyPolicy, robot: SimulatedRobot) -> Run:
    network = Network(conditions)
    sent: list[Sent] = []
    inferences = 0
    waiting: tuple[float, float, bool, dict[str, Any]] | None = None  # observed at, due, lost, observation
    observed_at, actions, executed = 0.0, np.zeros((0, 0), np.float32), conditions.execute
    for now in _times(conditions):
        if executed == conditions.execute:
            if waiting is None:
                seconds, lost = network.draw()
                waiting = now, now + seconds, lost, robot.observe()
                inferences += 1
            if now >= waiting[1]:
                observed_at, _, lost, observation = waiting
                if not lost:
                    actions, executed = policy.infer(observation)["actions"], 0
                waiting = None
        if executed == conditions.execute:
            sent.append(Sent(robot.last, True))
            continue
        late_s = now - observed_at - executed / conditions.control_hz
        sent.append(Sent(robot.act(actions[executed]), False, inferences, late_s))
        executed += 1
    return Run.of(sent, inferences)


def _asynchronous(conditions: Conditions, source: LocalSource, robot: SimulatedRobot) -> Run:
    # A minute without an answer: what the watchdog does is not what is compared here.
    control = ChunkControl(
        control_hz=conditions.control_hz, replan_after=conditions.replan_after, watchdog_s=60.0, hold="last"
    )
    network = Network(conditions)
    sent: list[Sent] = []
    pending: tuple[float, Request, Answer | None] | None = None
    asked: dict[int, tuple[int, float]] = {}  # by control step: which inference, and when its observation was taken
    for now in _times(conditions):
        if pending is not None and now >= pending[0]:
            _, request, answer = pending
            pending = None
            if answer is None:
                control.fail(ConnectionLost("an answer was lost, as simulated"))
            else:
                control.finish(request, answer, now)
        step, begun = control.step(now, robot.observe() if control.wants_observation() else None)
        if begun is not None:
            seconds, lost = network.draw()
            pending = now + seconds, begun, None if lost else source.chunk(begun)
            asked[begun.tick] = control.statistics.requests, now
        if step.chunk is None or step.action is None or step.index is None:
            sent.append(Sent(robot.last, True))
            continue
        number, observed_at = asked[step.chunk.tick]
        late_s = now - observed_at - step.index / conditions.control_hz
        stale = now - observed_at > len(step.chunk) / conditions.control_hz + 1e-9
        sent.append(Sent(robot.act(step.action), False, number, late_s, stale))
    return Run.of(sent, control.statistics.requests)


def _times(conditions: Conditions) -> list[float]:
    return [step / conditions.control_hz for step in range(conditions.steps)]

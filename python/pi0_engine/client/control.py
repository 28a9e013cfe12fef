"""What a control loop does in each step, without threads and without a clock: time comes with every call.

The runner calls it with real time and inferences in the background, the simulator with virtual time.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.client.schedule import Chunk, Schedule
from pi0_engine.client.statistics import Statistics
from pi0_engine.rtc.schedule import DelayEstimator

logger = logging.getLogger(__name__)

Action = NDArray[np.float32]
#: What to send when there is no action: the last command again, these numbers, or what a function makes of the last
#: command (None before the first).
Hold = Literal["last"] | ArrayLike | Callable[[Action | None], ArrayLike | None]
State = Literal["waiting", "running", "stopped"]


class UnusableChunk(ValueError):
    """A policy's answer that cannot be executed."""

    code = "unusable_chunk"


@dataclass(frozen=True, eq=False)
class Step:
    """What one control step sends to the robot.

    Attributes:
        tick: number of the control step in its episode.
        action: float32 [A]; None: send nothing, there has been no command yet that could be repeated.
        source: ``chunk``; ``hold``: a deadline was missed; ``waiting``: no chunk yet; ``stopped``: by the watchdog.
        chunk: that the action is of, else None.
        index: of the action in it.
    """

    tick: int
    action: Action | None
    source: Literal["chunk", "hold", "waiting", "stopped"]
    chunk: Chunk | None = None
    index: int | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """An inference to be made.

    Attributes:
        observation: a copy, which the robot's drivers will not write into.
        tick, observed_at: control step and time at which it was taken.
        epoch: number of resets before it.
        new_episode: no chunk of this epoch has been answered yet: the policy is to be reset first.
        previous: the chunk in execution, if any of it is left.
        executed: how many of its actions were executed before the observation.
        delay: how many more will be, until the answer is there, as far as is known.
        max_age_s: the answer is of no use once the observation is older; None: as long as the chunk lasts.
    """

    observation: Mapping[str, Any]
    tick: int
    observed_at: float
    epoch: int
    new_episode: bool
    previous: Chunk | None
    executed: int
    delay: int
    max_age_s: float | None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a policy made of a request.

    Attributes:
        actions: float [H, A].
        name: what the policy wants to hear of them again.
        guarded: what the robot's guards did to them: ``none``, ``clip`` or ``hold``.
    """

    actions: ArrayLike
    name: Any = None
    guarded: str = "none"


class ChunkControl:
    """Decides in each control step what is sent to the robot, and when the next inference begins.

    Args:
        max_step: float [A], the largest change from one command to the next, in robot units, infinite where it is free.
            The guards see one chunk at a time; where another one takes over, only the control loop knows both sides.

        The others are those of :class:`pi0_engine.client.ChunkRunner`.

    Attributes:
        state: ``waiting`` for the first chunk of an episode, ``running``, or ``stopped``.
        tick: number of the next control step. It stands still while waiting, because the robot does.
        statistics: counts of everything.
        last_error: of the last inference that failed.
    """

    def __init__(
        self,
        *,
        control_hz: float,
        replan_after: int | None = None,
        max_chunk_age_s: float | None = None,
        watchdog_s: float = 2.0,
        hold: Hold,
        max_step: ArrayLike | None = None,
    ) -> None:
        self.delays = DelayEstimator(control_hz)
        self._period = 1 / control_hz
        for name, value in (("max_chunk_age_s", max_chunk_age_s), ("watchdog_s", watchdog_s)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected seconds above 0")
        if replan_after is not None and replan_after < 1:
            raise ValueError(f"replan_after is {replan_after}, expected at least 1 action, or None")
        if isinstance(hold, str) and hold != "last":
            raise ValueError(f"hold is {hold!r}, expected 'last', an action, or a function of the last one")
        self._replan_after, self._max_age_s, self._watchdog_s = replan_after or 1, max_chunk_age_s, watchdog_s
        self._hold = hold if callable(hold) or isinstance(hold, str) else np.array(hold, np.float32)
        self._max_step = None if max_step is None else np.array(max_step, np.float32)
        self._action_dim = self._width()
        self._schedule = Schedule()
        self.statistics = Statistics()
        self.last_error: Exception | None = None
        self._busy = False
        self._announced = -1  # the last epoch that the policy knows of
        self._begin()

    def _width(self) -> int | None:
        """A, as far as the arguments say. Raises ValueError where they say two things."""
        hold = self._hold.size if isinstance(self._hold, np.ndarray) else None
        step = None if self._max_step is None else self._max_step.size
        if hold is not None and step is not None and hold != step:
            raise ValueError(f"hold has {hold} numbers, expected {step}: so many actions the policy's robot has")
        return hold if hold is not None else step

    def _begin(self) -> None:
        self.state: State = "waiting"
        self.tick = 0
        self._last: Action | None = None
        self._executing: Chunk | None = None
        self._fed_at: float | None = None  # when nothing was wanted of the policy last, or the episode's first step
        self._stepped_at: float | None = None

    @property
    def epoch(self) -> int:
        return self._schedule.epoch

    def reset(self) -> None:
        """Begin a new episode: the old one's chunks are void, those still on their way too."""
        self._schedule.reset()
        self._begin()

    def wants_observation(self) -> bool:
        """Whether the next step should be given an observation, to begin an inference with."""
        if self._busy or self.state == "stopped":
            return False
        chunk = self._schedule.chunk
        return chunk is None or self.tick - chunk.tick >= self._replan_after

    def step(self, now: float, observation: Mapping[str, Any] | None = None) -> tuple[Step, Request | None]:
        """One control step at time ``now`` (seconds, never decreasing).

        Returns:
            What to send, and an inference to begin: its end is told to :meth:`finish` or :meth:`fail`.
        """
        self._watch(now)
        request = None
        if observation is not None and self.wants_observation():
            request = self._request(observation, now)
        index = self._schedule.index(self.tick, now)
        if self.state == "stopped":
            step = Step(self.tick, self._held(), "stopped")
            self.statistics.stopped += 1
        elif index is not None:
            step = self._execute(index)
        elif self.state == "waiting":
            step = Step(self.tick, self._held(), "waiting")
            self.statistics.waiting += 1
        else:
            step = Step(self.tick, self._held(), "hold")
            self.statistics.held += 1
        self._last = step.action
        if self.state != "waiting":
            self.tick += 1
        return step, request

    def finish(self, request: Request, answer: Answer, now: float) -> None:
        """Take the answer to a request, or discard it; either way the next one may begin."""
        self._busy = False
        latency_s = now - request.observed_at
        self.statistics.latencies_s.append(latency_s)
        self.delays.add(latency_s)
        self._announced = max(self._announced, request.epoch)
        try:
            actions = self._checked(answer.actions)
        except UnusableChunk as error:
            self.fail(error)
            return
        lasts_s = self._max_age_s or len(actions) * self._period
        chunk = Chunk(actions, request.tick, request.observed_at + lasts_s, request.epoch, answer.name)
        reason = "stopped" if self.state == "stopped" else self._schedule.offer(chunk, self.tick, now)
        if reason is not None:
            self.statistics.discarded[reason] += 1
            logger.debug("a chunk was discarded: %s", reason)
            return
        self.statistics.accepted += 1
        if answer.guarded != "none":
            self.statistics.guarded[answer.guarded] += 1
        self.state, self._fed_at = "running", now

    def fail(self, error: Exception, *, retry: bool = True) -> None:
        """An inference failed; with ``retry`` the next step with an observation may begin another."""
        kind = str(getattr(error, "code", type(error).__name__))
        level = logging.DEBUG if kind in self.statistics.errors else logging.WARNING
        logger.log(level, "inference failed (further ones like it are logged as debug): %s", error)
        self.statistics.errors[kind] += 1
        self.last_error = error
        self._busy = not retry

    def ready(self) -> None:
        """After ``fail(retry=False)``: the next inference may begin."""
        self._busy = False

    def _request(self, observation: Mapping[str, Any], now: float) -> Request:
        taken = copy.deepcopy(dict(observation))  # before anything is counted: what cannot be copied begins nothing
        self._busy = True
        self.statistics.requests += 1
        index = self._schedule.index(self.tick, now)
        return Request(
            observation=taken,
            tick=self.tick,
            observed_at=now,
            epoch=self.epoch,
            new_episode=self.epoch > self._announced,
            previous=None if index is None else self._schedule.chunk,
            executed=index or 0,
            delay=self.delays.delay(),
            max_age_s=self._max_age_s,
        )

    def _execute(self, index: int) -> Step:
        chunk = self._schedule.chunk
        assert chunk is not None
        action = chunk.actions[index].copy()
        if chunk is not self._executing and self._last is not None:
            self.statistics.seam_jumps.append(float(np.abs(action - self._last).max()))
        if self._max_step is not None and self._last is not None:
            # The expressions of the guards' velocity: within a chunk that keeps it this changes nothing.
            wanted, action = action, np.clip(action, self._last - self._max_step, self._last + self._max_step)
            self.statistics.limited += bool((action != wanted).any())
        self._executing = chunk
        self.statistics.executed += 1
        return Step(self.tick, action, "chunk", chunk, index)

    def _held(self) -> Action | None:
        if isinstance(self._hold, str):
            return None if self._last is None else self._last.copy()
        action = self._hold(self._last) if callable(self._hold) else self._hold
        return None if action is None else np.array(action, np.float32)

    def _watch(self, now: float) -> None:
        if self._stepped_at is not None and now - self._stepped_at > 1.5 * self._period:
            self.statistics.overruns += 1
        self._stepped_at = now
        if self._fed_at is None or not (self._busy or self.wants_observation()):
            self._fed_at = now
        if self.state != "stopped" and now - self._fed_at > self._watchdog_s:
            self.state = "stopped"
            logger.error(
                "stopped: no new chunk for %.2f s of asking, watchdog_s is %.2f; holding until reset(). Last error: %s",
                now - self._fed_at, self._watchdog_s, self.last_error,
            )  # fmt: skip

    def _checked(self, given: ArrayLike) -> NDArray[np.float32]:
        actions = np.asarray(given, np.float32)
        width = self._action_dim
        if actions.ndim != 2 or actions.size == 0 or (width is not None and actions.shape[1] != width):
            raise UnusableChunk(f"a chunk has shape {list(actions.shape)}, expected [H, {width or 'A'}]")
        if not np.isfinite(actions).all():
            raise UnusableChunk("a chunk holds NaN or infinity")
        self._action_dim = actions.shape[1]
        return actions

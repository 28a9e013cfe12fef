"""``ChunkRunner``: a robot's control loop goes on at its rate while the next chunk is computed in the background."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pi0_engine.client.control import Action, ChunkControl, Hold, Request, State, Step
from pi0_engine.client.declared import Declared
from pi0_engine.client.sources import as_source
from pi0_engine.client.statistics import Statistics

Observation = Mapping[str, Any]
#: Between attempts to reach a policy that cannot be reached at all.
_RETRY_S = 0.5


class Stopped(RuntimeError):
    """The watchdog stopped the episode: nothing new came from the policy for too long."""


class ChunkRunner:
    """Executes the chunks of a policy without ever waiting for it.

    The robot's own loop calls :meth:`step` once per control period, with its observation, and sends what it returns;
    :meth:`run` is that loop for those who have none. The rules are those of docs/client.md: element k of a chunk is for
    the k-th control step after its observation's, and for no other.

    Args:
        policy: a :class:`~pi0_engine.client.PolicyClient`, a ``Pi0Policy``, or a ``ChunkSource``. It stays its
            owner's: close it after the runner.
        control_hz: control steps per second, as the policy was trained; no more than its robot declares.
        hold: what to send where there is no action: ``"last"``, the last command again, which keeps a robot still that
            is told positions, and keeps one moving that is told velocities; an action float [A] (zeros for velocities);
            or a function of the last command, for a mixture.
        replan_after: begin the next inference once the chunk in execution is this many control steps old; None: as
            soon as the last one has ended.
        rtc: let chunks continue each other (real-time chunking), where the policy can.
        max_chunk_age_s: no action is executed whose observation is older, and a server, which is told, does not begin
            what would be too late; None: as long as its chunk lasts, H / control_hz, and a server is told nothing.
        watchdog_s: stop the episode if a new chunk is wanted and none came for this long. Above the longest inference.
        clock: seconds, never decreasing.

    Raises:
        ValueError: an argument that cannot be used, named.
    """

    def __init__(
        self,
        policy: Any,
        *,
        control_hz: float,
        hold: Hold,
        replan_after: int | None = None,
        rtc: bool = True,
        max_chunk_age_s: float | None = None,
        watchdog_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        declared = Declared.of(policy)
        declared.check_rate(control_hz)
        self._control = ChunkControl(
            control_hz=control_hz,
            max_step=declared.max_step,
            replan_after=replan_after,
            max_chunk_age_s=max_chunk_age_s,
            watchdog_s=watchdog_s,
            hold=hold,
        )
        self._source = as_source(policy, rtc=rtc, clock=clock)
        self._period, self._clock = 1 / control_hz, clock
        self._lock = threading.Lock()  # of the control; never held while a policy computes
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.last_step: Step | None = None
        self._thread = threading.Thread(target=self._infer, name="pi0-chunks", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """``waiting`` for the first chunk of the episode, ``running``, or ``stopped`` until :meth:`reset`."""
        return self._control.state

    @property
    def last_error(self) -> Exception | None:
        """Of the last inference that failed."""
        return self._control.last_error

    @property
    def statistics(self) -> Statistics:
        """A copy of what was counted so far."""
        with self._lock:
            return copy.deepcopy(self._control.statistics)

    def step(self, observation: Observation | Callable[[], Observation]) -> Action | None:
        """One control step; never waits for the policy.

        Args:
            observation: by the robot's declaration; or a function that takes it, which is called only when an
                inference begins, in this thread: cameras need not be read in every control step.

        Returns:
            float32 [A], what to send to the robot; None: nothing, which happens before an episode's first chunk only.
            ``last_step`` says where it is from.
        """
        if self._closing.is_set():
            raise RuntimeError("the runner is closed")
        with self._lock:
            wanted = self._control.wants_observation()
        taken = (observation() if callable(observation) else observation) if wanted else None
        with self._lock:
            step, request = self._control.step(self._clock(), taken)
        if request is not None:
            self._requests.put(request)
        self.last_step = step
        return step.action

    def reset(self) -> None:
        """Begin a new episode: the robot was moved, the task is another, or the watchdog had stopped.

        Void from now on: what is being executed, and what is being computed.
        """
        with self._lock:
            self._control.reset()

    def run(
        self,
        observe: Callable[[], Observation],
        act: Callable[[Action], None],
        *,
        seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """The control loop: at each period take an observation if one is wanted, step, act.

        Args:
            observe, act: of the robot; both are called in this thread.
            seconds: return after this time; None never.
            stop: return when it is set.

        Raises:
            Stopped: by the watchdog, after ``act`` was given the hold action.
        """
        stop = stop or threading.Event()
        due = started = self._clock()
        while not stop.is_set() and (seconds is None or due - started < seconds):
            action = self.step(observe)
            given = self._clock()
            if action is not None:
                act(action)
            if self.state == "stopped":
                raise Stopped(f"no new chunk in time; the last error: {self.last_error}")
            # A late command is not caught up on: two at once would be a jump. What is late by less than half a period
            # does not make the loop slower.
            on_time = given - due <= self._period / 2
            due = max((due if on_time else given) + self._period, self._clock())
            stop.wait(max(0.0, due - self._clock()))

    def close(self, timeout_s: float = 5.0) -> None:
        """End the inference thread; what it is computing is waited for, at most ``timeout_s``."""
        self._closing.set()
        self._requests.put(None)
        self._thread.join(timeout_s)

    def __enter__(self) -> ChunkRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _infer(self) -> None:
        """The inference thread: nothing that goes wrong in here reaches the control loop but as a count."""
        while (request := self._requests.get()) is not None and not self._closing.is_set():
            try:
                answer = self._source.chunk(request)
                with self._lock:
                    self._control.finish(request, answer, self._clock())
            except Exception as error:
                with self._lock:
                    self._control.fail(error, retry=False)
                self._mend()

    def _mend(self) -> None:
        """After a failure: until the policy can be asked again, no observation is taken, so that none grows old."""
        while not self._closing.is_set():
            try:
                self._source.ready()
                break
            except Exception as error:
                with self._lock:
                    self._control.fail(error, retry=False)
                self._closing.wait(_RETRY_S)
        with self._lock:
            self._control.ready()

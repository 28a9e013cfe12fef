"""The policy, the queue in front of it and the sessions, whatever the messages come in by."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from pi0_engine.policy import Pi0Policy
from pi0_engine.recording.recorder import Recorder
from pi0_engine.serving.answer import Responder
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.metrics import Metrics
from pi0_engine.serving.protocol import SERVER_KEYS, describe, read_request
from pi0_engine.serving.queue import Job, JobQueue
from pi0_engine.serving.session import Session
from pi0_engine.serving.wire import packb
from pi0_engine.serving.worker import Worker


@dataclass(frozen=True)
class ServiceOptions:
    """How many clients are served, and how.

    Attributes:
        max_sessions: connections at a time.
        max_waiting: of them, how many may wait for the engine; a further one is told at once that the queue is full.
        seed: of the noise, with the number of the session; None draws from the operating system.
        metadata: sent to clients before everything else, beside what the server says itself (``reset_pose``, ...).
    """

    max_sessions: int = 32
    max_waiting: int = 8
    seed: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_sessions", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if taken := sorted(SERVER_KEYS & self.metadata.keys()):
            raise ValueError(f"the metadata has the keys {taken}, which the server says itself")
        try:
            packb(self.metadata)
        except ValueError as error:
            raise ValueError(f"the metadata {error}") from error


class Service:
    """Serves a policy to sessions. Its methods return at once; they are called from one thread, the event loop's.

    Args:
        load: makes the policy; called in the inference thread after :meth:`start`.
        options: see there.
        record: makes the recorder that is given every answer; called in that thread when the policy is loaded.

    Attributes:
        metrics: for ``/metrics``.
        ready: resolved when the policy has answered for the first time; to what kept it from that otherwise.
        broken: resolved, to the reason, when the policy will not answer again: end the process.
    """

    def __init__(
        self,
        load: Callable[[], Pi0Policy],
        options: ServiceOptions | None = None,
        *,
        record: Callable[[Pi0Policy], Recorder] | None = None,
    ) -> None:
        self.options = options or ServiceOptions()
        self._queue = JobQueue(self.options.max_waiting)
        self._sessions: set[Session] = set()
        self._numbers = itertools.count()
        self._stopping = False
        self.metrics = Metrics(lambda: len(self._queue), lambda: len(self._sessions))

        def responder(policy: Pi0Policy) -> Responder:
            return Responder(policy, self.metrics, None if record is None else record(policy))

        self._worker = Worker(self._queue, load, responder)
        self.ready: Future[Responder] = self._worker.ready
        self.broken: Future[str] = self._worker.broken

    def start(self) -> None:
        """Load the policy and begin to answer, in a thread of its own."""
        self._worker.start()

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now will be answered by a warm policy."""
        return not self._stopping and self.ready.done() and self.ready.exception() is None and not self.broken.done()

    @property
    def has_room(self) -> bool:
        """Whether another session may be opened."""
        return not self._stopping and len(self._sessions) < self.options.max_sessions

    def open(self) -> Session:
        """A new session. ``ready`` must be resolved.

        Raises:
            Refusal: ``queue_full``, or ``shutting_down``.
        """
        if self._stopping:
            raise Refusal("shutting_down", "the server is being stopped")
        if not self.has_room:
            raise Refusal("queue_full", f"{len(self._sessions)} sessions are open already")
        robot = self._policy.transform.robot
        session = Session(next(self._numbers), self.options.seed, robot.control_hz)
        self._sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        """Forget a session, and what it waits for."""
        self._sessions.discard(session)
        self._queue.drop(session, "the connection was closed")

    def greeting(self, session: Session) -> bytes:
        """The first message to a client: openpi's metadata."""
        policy, robot = self._policy, self._policy.transform.robot
        return packb(
            {
                **describe(robot, policy.config.model_type, policy.config.action_horizon),
                "control_hz": robot.control_hz,
                "guards": None if robot.guards is None else robot.guards.to_dict(),
                "rtc": asdict(policy.rtc) if policy.no_rtc is None else None,
                "session": session.name,
                "epoch": session.episode.epoch,
                **self.options.metadata,
            }
        )

    def submit(self, session: Session, data: bytes | str) -> Job:
        """Take a message; the job's ``answer`` gets the reply, or a :class:`Refusal`.

        Raises:
            Refusal: at once, for a message that cannot be used or a full queue.
        """
        received = time.perf_counter()
        request = read_request(data, self._policy.transform.robot)
        if request.observation is not None:
            # Before anything is changed: a request that is refused resets nothing. Nobody else puts, so room remains.
            self._queue.check_room(session, request.name)
        if request.reset:
            session.reset(request.seed)
            self._queue.drop(session, "the session was reset")
        job = Job(session, request, session.episode, received)
        if request.observation is not None:
            self._queue.put(job)
        else:
            name = {} if request.name is None else {"request": request.name}
            job.finish(packb({"reset": True, "session": session.describe(), **name}))
        return job

    def stop(self) -> None:
        """Take no more requests; what waits is still answered."""
        self._stopping = True
        self._queue.close()

    def finish(self, timeout_s: float) -> bool:
        """After :meth:`stop`: wait for the answers, and close the recorder. Blocks.

        Returns whether all was answered in time. If not, what waits is refused, what is being computed is neither
        recorded nor to be waited for, and its thread is still at work: see :attr:`PolicyServer.drained`.
        """
        if self._worker.join(timeout_s):
            return True
        self._queue.abandon()
        if self.ready.done() and self.ready.exception() is None:
            self.ready.result().close()
        return False

    @property
    def _policy(self) -> Pi0Policy:
        return self.ready.result(timeout=0).policy

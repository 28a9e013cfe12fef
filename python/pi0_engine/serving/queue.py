"""Who waits for the one engine: at most one observation per session, the latest."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.protocol import Request
from pi0_engine.serving.session import Episode, Session


@dataclass(eq=False)
class Job:
    """One request on its way. ``answer`` gets the reply's bytes or a :class:`Refusal`.

    Attributes:
        episode: of the session when the request came; after a reset the job is void.
        received: ``time.perf_counter()`` at receipt.
    """

    session: Session
    request: Request
    episode: Episode
    received: float
    answer: Future[bytes] = field(default_factory=Future)

    @property
    def age_ms(self) -> float:
        """Since receipt."""
        return 1e3 * (time.perf_counter() - self.received)

    def check_epoch(self) -> None:
        """Raises :class:`Refusal`: the session has been reset since the request came."""
        if self.episode is not self.session.episode:
            raise Refusal("superseded", "the session was reset meanwhile", self.request.name)

    def finish(self, reply: bytes) -> None:
        with suppress(InvalidStateError):  # whoever waited for it has gone
            self.answer.set_result(reply)

    def refuse(self, code: str, message: str) -> None:
        with suppress(InvalidStateError):
            self.answer.set_exception(Refusal(code, message, self.request.name))


class JobQueue:
    """Sessions take turns: a session's place is that of its first waiting request, also after a newer one replaced it.

    Args:
        capacity: sessions that may wait; beyond it a request is refused at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: OrderedDict[Session, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Wait in line, in place of an older request of the same session, which is refused as superseded.

        Raises:
            Refusal: ``queue_full``, or ``shutting_down`` after :meth:`close`.
        """
        with self._changed:
            self.check_room(job.session, job.request.name)
            older = self._waiting.get(job.session)
            self._waiting[job.session] = job
            self._changed.notify()
        if older is not None:
            older.refuse("superseded", "a newer observation of this session took its place")

    def check_room(self, session: Session, name: int | str | None) -> None:
        """Raise what :meth:`put` would raise now for a request of this session and name."""
        with self._changed:
            if self._closed:
                raise Refusal("shutting_down", "the server is being stopped", name)
            if session not in self._waiting and len(self._waiting) >= self._capacity:
                raise Refusal("queue_full", f"{len(self._waiting)} sessions are waiting already; try again", name)

    def take(self) -> Job | None:
        """The next job, when there is one; None when the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.popitem(last=False)[1] if self._waiting else None

    def drop(self, session: Session, why: str) -> None:
        """Refuse what a session waits for, as superseded."""
        with self._changed:
            job = self._waiting.pop(session, None)
        if job is not None:
            job.refuse("superseded", why)

    def close(self) -> None:
        """Take no more; what waits is still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Close, and refuse what waits."""
        self.close()
        with self._changed:
            jobs = list(self._waiting.values())
            self._waiting.clear()
        for job in jobs:
            job.refuse("shutting_down", "the server is being stopped")

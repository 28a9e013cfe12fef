"""The one thread that loads the policy and runs it, job after job, beside the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from pi0_engine.policy import Pi0Policy
from pi0_engine.serving.answer import Responder
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.example import example_observation
from pi0_engine.serving.queue import Job, JobQueue

log = logging.getLogger(__name__)


class Worker:
    """Runs what the queue holds until it is closed and empty.

    Args:
        queue: of jobs.
        load: makes the policy, not yet warmed up. Called in the thread, so that the server can say meanwhile that it
            is alive and not ready.
        respond: makes the responder that turns jobs into replies.

    Attributes:
        ready: the responder, after an inference has succeeded; or the error that prevented it.
        broken: set when the policy fails on an observation that it must be able to answer: it will not recover (a
            lost GPU, for one), and the process should end for a supervisor to start another.
    """

    def __init__(
        self, queue: JobQueue, load: Callable[[], Pi0Policy], respond: Callable[[Pi0Policy], Responder]
    ) -> None:
        self._queue, self._load, self._respond = queue, load, respond
        self.ready: Future[Responder] = Future()
        self.broken: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the queue; whether it was reached in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            policy = self._load()
            policy.warm_up()
            _check(policy)
            responder = self._respond(policy)
        except BaseException as error:  # whatever it is, who waits for the policy must hear of it
            self.ready.set_exception(error)
            return
        self.ready.set_result(responder)
        while (job := self._queue.take()) is not None:
            self._answer(responder, job)
        responder.close()

    def _answer(self, responder: Responder, job: Job) -> None:
        try:
            job.finish(responder.answer(job))
        except Refusal as refusal:
            job.refuse(refusal.code, refusal.message)
            if refusal.code == "not_finite":
                self._examine(responder.policy)
        except BaseException:  # whatever it is, this thread must go on, or say that it cannot
            log.exception("session %s: inference failed", job.session.name)
            job.refuse("inference_failed", "an error inside the server; its log says more")
            self._examine(responder.policy)

    def _examine(self, policy: Pi0Policy) -> None:
        """After a failure: is the policy still able to answer?"""
        try:
            _check(policy)
        except BaseException as error:
            log.exception("the policy fails on an observation of zeros too")
            if not self.broken.done():
                self.broken.set_result(f"inference does not work any more: {error}")


def _check(policy: Pi0Policy) -> None:
    """One inference on an observation that shows nothing; raises what it raises."""
    policy.infer(example_observation(policy.transform.robot), seed=0)

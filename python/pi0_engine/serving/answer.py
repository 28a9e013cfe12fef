"""One job to one reply: what is checked before the policy runs, what after it, and what the client is told."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from pi0_engine.inputs import NotFiniteError
from pi0_engine.policy import Pi0Policy
from pi0_engine.recording.files import Record
from pi0_engine.recording.recorder import Recorder
from pi0_engine.robots.guards import GuardReport, GuardViolation, check, check_age
from pi0_engine.robots.observation import ObservationError
from pi0_engine.rtc.schedule import Leftover
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.metrics import Metrics
from pi0_engine.serving.queue import Job
from pi0_engine.serving.wire import packb


class Responder:
    """Answers jobs with a policy, one at a time.

    Args:
        policy: loaded and warm.
        metrics: told of every answer.
        recorder: given every chunk that was computed, where there is one.
    """

    def __init__(self, policy: Pi0Policy, metrics: Metrics, recorder: Recorder | None = None) -> None:
        self.policy, self._metrics, self._recorder = policy, metrics, recorder
        self._robot = policy.transform.robot
        self._closing = threading.Lock()

    def answer(self, job: Job) -> bytes:
        """The reply's bytes.

        Raises:
            Refusal: with its code.
        """
        queue_ms = job.age_ms
        self._check_turn(job, queue_ms)
        try:
            return self._answer(job, queue_ms)
        except ObservationError as error:
            raise Refusal("bad_observation", str(error)) from error

    def _check_turn(self, job: Job, queue_ms: float) -> None:
        """Is the answer still wanted, now that the engine is free?"""
        job.check_epoch()
        deadline_ms = job.request.deadline_ms
        if deadline_ms is not None and queue_ms >= deadline_ms:
            self._metrics.deadline(met=False)
            raise Refusal(
                "deadline_missed", f"waited {queue_ms:.1f} ms for the engine, the deadline was {deadline_ms} ms"
            )
        try:
            check_age(job.request.age_ms + queue_ms, self._robot.guards)
        except GuardViolation as error:
            raise Refusal(error.code, str(error)) from error

    def _answer(self, job: Job, queue_ms: float) -> bytes:
        request, session, episode = job.request, job.session, job.episode
        observation = request.observation
        assert observation is not None  # what only resets is never queued
        if request.seed is not None:
            episode.rng = np.random.default_rng(request.seed)
        shape = self.policy.config.action_horizon, self.policy.config.action_dim
        noise = episode.rng.standard_normal(shape, dtype=np.float32)
        leftover, why_not = self._leftover(job)
        record = {"noise": noise, "leftover": leftover}
        started = time.perf_counter()
        try:
            result = self.policy.infer(observation, noise=noise, leftover=leftover)
            infer_ms = 1e3 * (time.perf_counter() - started)
            report = check(result["actions"], observation.state, self._robot.guards, self._robot.control_hz)
        except (GuardViolation, NotFiniteError) as error:
            code = error.code if isinstance(error, GuardViolation) else "not_finite"
            self._record(job, {"error": {"code": code, "message": str(error)}}, **record)
            raise Refusal(code, str(error)) from error
        job.check_epoch()
        sequence = session.next_sequence()
        episode.remember(sequence, report.actions)
        reply: dict[str, Any] = {
            "actions": report.actions,
            "policy_timing": result["policy_timing"],
            "server_timing": {"infer_ms": infer_ms, "queue_ms": queue_ms},
            "session": {"id": session.name, "epoch": episode.epoch, "sequence": sequence},
        }
        if session.total_ms is not None:
            reply["server_timing"]["prev_total_ms"] = session.total_ms
        if request.name is not None:
            reply["request"] = request.name
        if request.continues is not None:
            reply["rtc"] = result["rtc"] if why_not is None else {**result["rtc"], "reason": why_not}
        if self._robot.guards is not None:
            reply["guards"] = report.to_dict()
        self._count(job, reply, report, infer_ms, queue_ms)
        self._record(job, reply, **record)
        return packb(reply)

    def close(self) -> None:
        """Write what the recorder still holds; returns when that is done, whichever thread began. Answers go on."""
        if self._recorder is not None:
            with self._closing:
                self._recorder.close()

    def _record(self, job: Job, reply: dict[str, Any], **record: Any) -> None:
        if self._recorder is not None:
            request = job.request
            control = {"request": request.name, "age_ms": request.age_ms, "deadline_ms": request.deadline_ms}
            self._recorder.write(
                Record(
                    observation=request.sent,
                    reply=reply,
                    control={"session": job.session.name, **control},
                    latency_ms=job.age_ms,
                    time=time.time(),
                    **record,
                )
            )

    def _leftover(self, job: Job) -> tuple[Leftover | None, str | None]:
        """What the new chunk continues, or why it continues none although the client asks."""
        asked, session, chunks = job.request.continues, job.session, job.episode.chunks
        if asked is None:
            return None, None
        if (why_not := self.policy.no_rtc) is not None:  # with the first message, not when a chunk is in execution
            raise Refusal("bad_request", why_not)
        sequence = asked.sequence if asked.sequence is not None else next(reversed(chunks), None)
        chunk = None if sequence is None else chunks.get(sequence)
        if chunk is None:
            return None, f"chunk {sequence} is not among {list(chunks)}" if chunks else "the episode has no chunk yet"
        if asked.executed >= len(chunk):
            return None, f"all {len(chunk)} actions of chunk {sequence} have been executed"
        delay = asked.delay
        if delay is None:
            if session.delay is None:
                why = f"robot {self._robot.name!r} declares no control_hz to count the latency in"
                raise Refusal("bad_request", f"pi0_engine.rtc.delay is missing, and {why}")
            delay = session.delay.delay()
        return Leftover(chunk[asked.executed :], delay), None

    def _count(self, job: Job, reply: dict[str, Any], report: GuardReport, infer_ms: float, queue_ms: float) -> None:
        """Tell the client about its deadline, the session and the metrics about the time."""
        session, deadline_ms, total_ms = job.session, job.request.deadline_ms, job.age_ms
        if deadline_ms is not None:
            met = total_ms <= deadline_ms
            reply["deadline"] = {"met": met, "budget_ms": deadline_ms, "used_ms": total_ms}
            self._metrics.deadline(met)
        if report.applied != "none":
            self._metrics.guarded(report.applied)
        session.total_ms = total_ms
        if session.delay is not None:
            session.delay.add(1e-3 * total_ms)
        self._metrics.answered(total_s=1e-3 * total_ms, infer_s=1e-3 * infer_ms, queue_s=1e-3 * queue_ms)

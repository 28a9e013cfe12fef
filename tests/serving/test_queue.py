"""Who waits for the engine: the latest observation of each session, in the order in which the sessions came."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.protocol import Request
from pi0_engine.serving.queue import Job, JobQueue
from pi0_engine.serving.session import Session


def sessions(count: int) -> list[Session]:
    return [Session(number, seed=0, control_hz=None) for number in range(count)]


def job(session: Session, name: str = "") -> Job:
    return Job(session, Request(None, name=name), session.episode, received=0.0)


def code(future: Future[bytes]) -> str:
    error = future.exception(timeout=0)
    assert isinstance(error, Refusal)
    return error.code


def test_the_latest_observation_takes_the_place_of_the_one_before() -> None:
    queue, (a, b) = JobQueue(4), sessions(2)
    old, other, new = job(a, "old"), job(b), job(a, "new")
    for each in (old, other, new):
        queue.put(each)
    assert code(old.answer) == "superseded" and len(queue) == 2
    assert queue.take() is new  # in the place of the old one: a session that sends more does not fall behind
    assert queue.take() is other


def test_a_full_queue_answers_at_once() -> None:
    queue, (a, b, c) = JobQueue(2), sessions(3)
    queue.put(job(a))
    queue.put(job(b))
    with pytest.raises(Refusal, match="2 sessions are waiting") as caught:
        queue.put(job(c))
    assert caught.value.code == "queue_full"
    queue.put(job(a))  # replacing takes no room
    assert len(queue) == 2


def test_what_waits_is_answered_after_closing_and_nothing_else() -> None:
    queue, (a, b) = JobQueue(2), sessions(2)
    waiting = job(a)
    queue.put(waiting)
    queue.close()
    with pytest.raises(Refusal) as caught:
        queue.put(job(b))
    assert caught.value.code == "shutting_down"
    assert queue.take() is waiting and queue.take() is None


def test_abandoning_refuses_what_waits() -> None:
    queue, (a,) = JobQueue(2), sessions(1)
    waiting = job(a)
    queue.put(waiting)
    queue.abandon()
    assert code(waiting.answer) == "shutting_down" and queue.take() is None


def test_a_session_that_leaves_waits_no_longer() -> None:
    queue, (a, b) = JobQueue(2), sessions(2)
    left, stays = job(a), job(b)
    queue.put(left)
    queue.put(stays)
    queue.drop(a, "gone")
    assert code(left.answer) == "superseded"
    assert queue.take() is stays


def test_whoever_takes_waits_for_work() -> None:
    queue, (a,) = JobQueue(1), sessions(1)
    taken: list[Job | None] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    work = job(a)
    queue.put(work)
    thread.join(10)
    assert taken == [work]


def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    work = job(sessions(1)[0])
    assert work.answer.cancel()
    work.finish(b"late")
    work.refuse("superseded", "late too")
    assert work.answer.cancelled()

"""One connection from greeting to goodbye, whatever carries its messages."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.service import Service
from pi0_engine.serving.session import Session

log = logging.getLogger(__name__)

#: Answers of one connection that are under way: one is computed, one waits, two may be on their way out. A client that
#: sends more without reading is not read either, until it does.
_UNDER_WAY = 4


class Transport(Protocol):
    """A connection that carries messages."""

    async def receive(self) -> bytes | str | None:
        """The next message; None when the connection has ended."""

    async def send(self, message: bytes | str) -> None:
        """Send; returns quietly when the connection has ended."""


async def converse(transport: Transport, service: Service) -> None:
    """Greet when the policy is ready, then answer every message, until the connection ends.

    The connection is read while an inference runs, so that a newer observation can take an older one's place.

    Raises:
        Refusal: there is no room for another session.
        Exception: what kept the policy from becoming ready.
    """
    await asyncio.shield(asyncio.wrap_future(service.ready))
    session = service.open()
    room = asyncio.Semaphore(_UNDER_WAY)
    answers: set[asyncio.Task[None]] = set()
    try:
        await transport.send(service.greeting(session))
        while (message := await transport.receive()) is not None:
            await room.acquire()
            answer = asyncio.create_task(_answer(transport, service, session, message))
            answers.add(answer)
            answer.add_done_callback(answers.discard)
            answer.add_done_callback(lambda _: room.release())
            # Let it take its place in the queue before the next message is read.
            await asyncio.sleep(0)
    finally:
        service.close(session)
        for answer in answers:
            answer.cancel()


async def _answer(transport: Transport, service: Service, session: Session, message: bytes | str) -> None:
    try:
        job = service.submit(session, message)
        reply: bytes | str = await asyncio.wrap_future(job.answer)
        if job.request.observation is not None:
            job.check_epoch()  # a reset may have been answered while this was on its way from the thread
    except Refusal as refusal:
        service.metrics.refused(refusal.code)
        log.info("session %s: %s", session.name, refusal)
        reply = refusal.to_json()
    except Exception:
        log.exception("session %s: a message could not be answered", session.name)
        failed = Refusal("inference_failed", "an error inside the server; its log says more")
        service.metrics.refused(failed.code)
        reply = failed.to_json()
    await transport.send(reply)

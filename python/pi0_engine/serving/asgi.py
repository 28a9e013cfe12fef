"""The policy server as an ASGI application, for servers that bring a websocket implementation of their own.

It answers as :mod:`pi0_engine.serving.server` does: the same conversation, the same refusals, the same paths. Written
against the ASGI specification (websocket and its denial response, HTTP, lifespan) alone, without a framework.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from pi0_engine.serving.access import Keys, refusal
from pi0_engine.serving.conversation import converse
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.service import Service

log = logging.getLogger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

#: Close codes of RFC 6455.
GOING_AWAY, TOO_BIG, INTERNAL_ERROR, TRY_AGAIN_LATER = 1001, 1009, 1011, 1013
#: What a client is told of an error that is not its own.
_HIDDEN = "an error inside the server; its log says more"


class Application:
    """Answers for one :class:`Service`, in one event loop: that in which it is made.

    When the policy breaks, every connection is closed and none is opened, so that robots go elsewhere at once.

    Args:
        service: started.
        keys: who may connect.
        max_message_bytes: a larger message closes its connection.
        exposition: gives content type and body of ``/metrics``.
    """

    def __init__(
        self,
        service: Service,
        keys: Keys,
        max_message_bytes: int,
        exposition: Callable[[], Awaitable[tuple[str, bytes]]],
    ) -> None:
        self._service, self._keys = service, keys
        self._max_message_bytes, self._exposition = max_message_bytes, exposition
        self._connections: set[_Connection] = set()
        self._watch = asyncio.get_running_loop().create_task(self._close_when_broken())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "websocket":
            await self._websocket(scope, receive, send)
        elif kind == "http":
            await self._http(scope, send)
        else:
            await lifespan(receive, send)

    async def close(self, code: int, reason: str) -> None:
        """Close every connection; returns when the clients have taken note, or after a second."""
        connections = set(self._connections)
        await asyncio.gather(*(connection.close(code, reason) for connection in connections))
        for _ in range(20):
            if not connections & self._connections:
                return
            await asyncio.sleep(0.05)

    async def _websocket(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if (await receive())["type"] != "websocket.connect":
            return  # the client has gone already
        refused = self._refused(scope)
        if refused is not None:
            await _respond(send, *refused, prefix="websocket.http.response")
            return
        await send({"type": "websocket.accept"})
        connection = _Connection(receive, send, self._max_message_bytes)
        self._connections.add(connection)
        try:
            await converse(connection, self._service)
        except Refusal as refusal:
            self._service.metrics.refused(refusal.code)
            await connection.close(TRY_AGAIN_LATER, str(refusal))
        except Exception:
            log.exception("connection of %s", scope.get("client"))
            await connection.close(INTERNAL_ERROR, _HIDDEN)
        finally:
            self._connections.discard(connection)

    async def _close_when_broken(self) -> None:
        reason: str = await asyncio.wrap_future(self._service.broken)
        log.error("%s", reason)
        await self.close(INTERNAL_ERROR, "inference does not work any more")

    def _refused(self, scope: MutableMapping[str, Any]) -> tuple[HTTPStatus, str] | None:
        """Why the websocket is not opened; None opens it."""
        if (stranger := self._stranger(scope)) is not None:
            return stranger
        if self._service.broken.done():
            return HTTPStatus.SERVICE_UNAVAILABLE, "inference does not work any more\n"
        if not self._service.has_room:
            self._service.metrics.refused("queue_full")
            return HTTPStatus.SERVICE_UNAVAILABLE, "no room for another session\n"
        return None

    async def _http(self, scope: MutableMapping[str, Any], send: Send) -> None:
        path = scope["path"]
        if path == "/healthz":
            await _respond(send, HTTPStatus.OK, "OK\n")
        elif path == "/readyz":
            ready = self._service.is_ready
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            await _respond(send, status, "ready\n" if ready else "not ready\n")
        elif (stranger := self._stranger(scope)) is not None:
            await _respond(send, *stranger)
        elif path == "/metrics":
            try:
                kind, body = await self._exposition()
            except Exception:
                log.exception("metrics")
                await _respond(
                    send, HTTPStatus.INTERNAL_SERVER_ERROR, "an error inside the server; its log says more\n"
                )
            else:
                await _respond(send, HTTPStatus.OK, body, kind=kind)
        else:
            await _respond(send, HTTPStatus.UPGRADE_REQUIRED, "expected a websocket\n")

    def _stranger(self, scope: MutableMapping[str, Any]) -> tuple[HTTPStatus, str] | None:
        """Why the client may not come in; None lets it in."""
        given = [
            value.decode("utf-8", "surrogateescape") for name, value in scope["headers"] if name == b"authorization"
        ]
        from_web_page = any(name == b"origin" for name, _ in scope["headers"])
        refused = refusal(self._keys, given, from_web_page=from_web_page)
        if refused is not None:
            self._service.metrics.refused("unauthorized")
        return refused


class _Connection:
    """An accepted ASGI websocket as a :class:`~pi0_engine.serving.conversation.Transport`."""

    def __init__(self, receive: Receive, send: Send, max_message_bytes: int) -> None:
        self._receive, self._send, self._max_message_bytes = receive, send, max_message_bytes
        self._ended = False

    async def receive(self) -> bytes | str | None:
        try:
            event = await self._receive()
        except Exception:
            if not self._ended:
                raise
            return None  # whatever carried the connection was gone before the client had taken note of its end
        if event["type"] == "websocket.disconnect":
            self._ended = True
            return None
        message: bytes | str | None = event.get("bytes")
        if message is None:
            message = event["text"]
        size = len(message if isinstance(message, bytes) else message.encode())
        if size > self._max_message_bytes:
            await self.close(TOO_BIG, f"a message of {size} bytes, expected at most {self._max_message_bytes}")
            return None
        return message

    async def send(self, message: bytes | str) -> None:
        if self._ended:
            log.debug("a reply found its connection closed")
            return
        kind = "bytes" if isinstance(message, bytes) else "text"
        await self._send({"type": "websocket.send", kind: message})

    async def close(self, code: int, reason: str) -> None:
        if not self._ended:
            self._ended = True
            await self._send({"type": "websocket.close", "code": code, "reason": reason})


async def _respond(
    send: Send, status: HTTPStatus, body: str | bytes, *, kind: str = "text/plain", prefix: str = "http.response"
) -> None:
    data = body.encode() if isinstance(body, str) else body
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(data)).encode())]
    await send({"type": f"{prefix}.start", "status": int(status), "headers": headers})
    await send({"type": f"{prefix}.body", "body": data})


async def lifespan(receive: Receive, send: Send) -> None:
    """Nothing is to be done at start and end: whoever made the service does it."""
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return

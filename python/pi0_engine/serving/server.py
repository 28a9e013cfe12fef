"""The websocket server: openpi's endpoint, ``/healthz``, ``/readyz`` and ``/metrics`` on one port."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pi0_engine.serving.access import Keys, check_exposure, refusal
from pi0_engine.serving.conversation import converse
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.service import Service

log = logging.getLogger(__name__)
#: What websockets says. Its versions before 17 print a traceback for every scanner that knocks.
_handshakes = logging.getLogger(f"{__name__}.websockets")
_handshakes.addFilter(lambda record: record.msg != "opening handshake failed")

#: A client that does not answer a ping for so long has gone, or is too slow to be of use: seconds.
_PING_S = 10
#: From the first byte of a connection to its handshake: seconds.
_OPEN_S = 5
#: Parts of one message. Empty ones count nothing towards its size, and not every version of websockets limits them.
_FRAGMENTS = 4096
#: Close codes of RFC 6455.
_GOING_AWAY, _TOO_BIG, _TRY_AGAIN_LATER, _INTERNAL_ERROR = 1001, 1009, 1013, 1011


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and what a connection may cost.

    Attributes:
        host, port: port 0 takes a free one.
        keys: who may connect.
        allow_unauthenticated: listen beyond this machine without keys.
        tls_cert, tls_key: PEM files; both or neither.
        max_message_mb: largest message, in 10^6 bytes. Three uncompressed 1280 x 720 frames are 8.3.
        drain_s: after SIGTERM, how long answers under way may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=Keys)
    allow_unauthenticated: bool = False
    tls_cert: str | Path | None = None
    tls_key: str | Path | None = None
    max_message_mb: float = 16.0
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        check_exposure(self.host, self.keys, allow_unauthenticated=self.allow_unauthenticated)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("expected both --tls-cert and --tls-key, or neither")
        if not 0 < self.max_message_mb < math.inf or not 0 <= self.drain_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"max_message_mb is {self.max_message_mb}, drain_s {self.drain_s}: expected above 0")

    def tls(self) -> ssl.SSLContext | None:
        """Raises ValueError for files that do not make a certificate."""
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key is refused: a server does not sit and ask its terminal.
            context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use {self.tls_cert} with {self.tls_key}: {error}") from error
        return context


class PolicyServer:
    """Serves a :class:`Service` over websockets until it is told to stop.

    Args:
        service: not yet started.
        options: see there.
        on_ready: called with the server's address when the policy is warm.

    Attributes:
        drained: False if ``drain_s`` ran out: the inference thread is still at work and cannot be ended. End the
            process by ``os._exit``; the interpreter's own end would take the thread's ground away and abort.
    """

    def __init__(
        self, service: Service, options: ServerOptions | None = None, *, on_ready: Callable[[str], Any] = log.info
    ) -> None:
        self.service, self.options = service, options or ServerOptions()
        self.drained = True
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._listening: Any = None

    async def run(self) -> None:
        """Listen, load, serve; returns after the drain that :meth:`stop` began.

        Raises:
            ValueError: an address that cannot be listened on, websockets missing, or what loading the policy raised.
            RuntimeError: inference stopped working.
        """
        tls = self.options.tls()
        serve = _websockets()
        try:
            self._listening = await serve(
                self._handle,
                self.options.host,
                self.options.port,
                process_request=self._http,
                ssl=tls,
                **({} if tls is None else _tls_timeouts()),
                compression=None,  # as openpi: camera frames do not get smaller, only later
                max_size=int(self.options.max_message_mb * 1e6),
                max_queue=1,  # newer messages stay in the socket's buffer
                open_timeout=_OPEN_S,
                ping_interval=_PING_S,
                ping_timeout=_PING_S,
                close_timeout=1,
                server_header=None,
                logger=_handshakes,
            )
        except OSError as error:
            raise ValueError(f"cannot listen on {self.options.host}:{self.options.port}: {error}") from error
        self.service.start()
        try:
            if await self._unless_stopped(self.service.ready):
                self._on_ready(self.address)
                if await self._unless_stopped(self.service.broken):
                    raise RuntimeError(self.service.broken.result())
        finally:
            self.stop()
            await self._drain()

    def stop(self) -> None:
        """Begin to drain. To be called in the event loop."""
        self._stop.set()

    @property
    def address(self) -> str:
        """``ws://HOST:PORT``, or ``wss``; the port is the real one."""
        port = self._listening.sockets[0].getsockname()[1]
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{'wss' if self.options.tls_cert else 'ws'}://{host}:{port}"

    async def _drain(self) -> None:
        """No new connections, no new requests, the answers under way, then goodbye."""
        self._listening.close(close_connections=False)
        self.service.stop()
        self.drained = await asyncio.to_thread(self.service.finish, self.options.drain_s)
        if not self.drained:
            log.warning("answers were still under way after %s s and have been dropped", self.options.drain_s)
        await asyncio.sleep(0.05)  # what was answered last is written to its sockets
        farewells = (c.close(_GOING_AWAY, "the server is being stopped") for c in self._listening.connections)
        await asyncio.gather(*farewells)
        await self._listening.wait_closed()

    async def _unless_stopped(self, future: Future[Any]) -> bool:
        """Wait for a future; False if the server is stopped before. Raises what it failed with."""
        awaited, stopped = asyncio.wrap_future(future), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([asyncio.shield(awaited), stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if awaited.done():
            awaited.result()
        return awaited.done()

    async def _handle(self, connection: Any) -> None:
        try:
            if not await self._unless_stopped(self.service.ready):
                raise Refusal("shutting_down", "the server is being stopped")
            await converse(_Websocket(connection), self.service)
        except Refusal as refusal:
            self.service.metrics.refused(refusal.code)
            await connection.close(_TRY_AGAIN_LATER, str(refusal))
        except Exception:
            log.exception("connection of %s", connection.remote_address)
            await connection.close(_INTERNAL_ERROR, "an error inside the server; its log says more")

    def _http(self, connection: Any, request: Any) -> Any:
        """Plain HTTP, and the refusals that come before a websocket is opened; None goes on to open it."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            ready = self.service.is_ready
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ready\n" if ready else "not ready\n")
        headers = request.headers
        refused = refusal(self.options.keys, headers.get_all("Authorization"), from_web_page="Origin" in headers)
        if refused is not None:
            self.service.metrics.refused("unauthorized")
            return connection.respond(*refused)
        if path == "/metrics":
            kind, body = self.service.metrics.exposition()
            response = connection.respond(HTTPStatus.OK, body.decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = kind
            return response
        # Connections, not sessions: those that wait for the policy to be loaded count too.
        if len(self._listening.connections) >= self.service.options.max_sessions:
            self.service.metrics.refused("queue_full")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "no room for another session\n")
        return None


class _Websocket:
    """A connection of the websockets package as a :class:`~pi0_engine.serving.conversation.Transport`."""

    def __init__(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        self._connection, self._closed = connection, ConnectionClosed

    async def receive(self) -> bytes | str | None:
        fragments: list[Any] = []
        try:
            async for fragment in self._connection.recv_streaming():
                fragments.append(fragment)
                if len(fragments) > _FRAGMENTS:
                    await self._connection.close(_TOO_BIG, f"a message of more than {_FRAGMENTS} fragments")
                    return None
        except self._closed:
            return None
        message: bytes | str = fragments[0][:0].join(fragments)  # text or bytes; one alone is not copied
        return message

    async def send(self, message: bytes | str) -> None:
        try:
            await self._connection.send(message)
        except self._closed:
            log.debug("a reply found its connection closed")


def _tls_timeouts() -> dict[str, float]:
    """Of its beginning and its end. Python 3.10's asyncio has none for the end: websockets' close_timeout is left."""
    begin: dict[str, float] = {"ssl_handshake_timeout": _OPEN_S}
    return begin if sys.version_info < (3, 11) else {**begin, "ssl_shutdown_timeout": 1}


def _websockets() -> Any:
    try:
        from websockets.asyncio.server import serve
    except ImportError as error:
        raise ValueError("websockets is not installed: pip install 'pi0-engine[serve]'") from error
    return serve

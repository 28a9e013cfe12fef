"""A websocket server whose every answer a test decides: for what a healthy policy server does not do."""

from __future__ import annotations

import contextlib
import http
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from pi0_engine.serving.wire import packb, unpackb

METADATA: dict[str, Any] = {"server": "pi0-engine", "protocol": 1, "robot": "toy", "action_dim": 3}
#: What answers a request map on a connection: a tree to pack, a frame as it is, or None to close without an answer.
Answering = Callable[[dict[str, Any], ServerConnection], Any]


def reply(request: dict[str, Any], horizon: int = 10) -> dict[str, Any]:
    """Actions that are the observation's state in every step."""
    asked = request.get("pi0_engine", {})
    if asked.get("reset"):
        return {"reset": True, "request": asked["request"]}
    answer: dict[str, Any] = {"actions": np.repeat(request["state"][None].astype(np.float32), horizon, axis=0)}
    return answer | ({"request": asked["request"]} if "request" in asked else {})


class PolicyServer:
    """Greets with metadata, then answers with what it is given.

    Attributes:
        requests: every request map that came, over all connections.
        headers: of every handshake.
        uri: the same after a restart.
    """

    def __init__(self, answer: Answering | None = None, metadata: dict[str, Any] | None = None) -> None:
        self.answer: Answering = answer or (lambda request, _: reply(request))
        self.metadata = METADATA if metadata is None else metadata
        self.refuse: http.HTTPStatus | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.connections: list[ServerConnection] = []
        self._server: Server | None = None
        self._port = 0
        self.start()

    @property
    def uri(self) -> str:
        return f"ws://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = serve(
            self._handle, "127.0.0.1", self._port, compression=None, process_request=self._http, ping_interval=None
        )
        self._port = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Close everything without a goodbye, as a crash does."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(2)
        self.connections = []

    def _http(self, connection: ServerConnection, request: Any) -> Any:
        self.headers.append(request.headers)
        return connection.respond(self.refuse, f"{self.refuse.phrase}\n") if self.refuse else None

    def _handle(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        with contextlib.suppress(ConnectionClosed):
            connection.send(packb(self.metadata | {"session": f"s{len(self.headers)}"}))
            while True:
                message = connection.recv()
                assert isinstance(message, bytes)
                request = unpackb(message)
                self.requests.append(request)
                answer = self.answer(request, connection)
                if answer is None:
                    return
                connection.send(packb(answer) if isinstance(answer, dict) else answer)


@contextlib.contextmanager
def policy_server(answer: Answering | None = None, metadata: dict[str, Any] | None = None) -> Iterator[PolicyServer]:
    server = PolicyServer(answer, metadata)
    try:
        yield server
    finally:
        server.stop()

"""What tests of the server say to it, and a policy that can be held up while they do."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import websockets.sync.client as websocket

from pi0_engine.policy import Pi0Policy
from pi0_engine.serving.wire import packb, unpackb
from tests.support.serving import PATIENCE_S, fresh_policy


@contextlib.contextmanager
def connect(port: int) -> Iterator[Any]:
    """A connection behind the greeting."""
    with websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
        assert unpackb(connection.recv(PATIENCE_S))["server"] == "pi0-engine"
        yield connection


def greeting(port: int) -> Any:
    """What a new client is told."""
    with websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
        return unpackb(connection.recv(PATIENCE_S))


def ask(connection: Any, **message: Any) -> Any:
    """One request: the reply's map, or the refusal's."""
    connection.send(packb(message))
    return reply(connection)


def reply(connection: Any) -> Any:
    answer = connection.recv(PATIENCE_S)
    return json.loads(answer) if isinstance(answer, str) else unpackb(answer)


def http(port: int, path: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=PATIENCE_S
        ) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Gated(Pi0Policy):
    """A policy that can be held up, and made to fail, after it has warmed up."""

    entered: threading.Semaphore
    gate: threading.Event
    failures: list[Exception]  # of the next inferences

    @classmethod
    def make(cls) -> Gated:
        gated = fresh_policy()
        gated.__class__ = cls
        assert isinstance(gated, cls)
        gated.entered, gated.gate = threading.Semaphore(0), threading.Event()
        gated.gate.set()
        gated.failures = []
        return gated

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        if self.failures:
            raise self.failures.pop()
        return super().infer(*args, **kwargs)

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S)

"""The ASGI application behind uvicorn: what it shares with the server without one, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client as websocket

from pi0_engine.policy import Pi0Policy
from pi0_engine.serving.access import Keys
from pi0_engine.serving.asgi import GOING_AWAY, Application
from pi0_engine.serving.ray_app import Replica
from pi0_engine.serving.service import Service, ServiceOptions
from pi0_engine.serving.wire import packb, unpackb
from tests.support.serving import PATIENCE_S, fresh_policy, noise, observation, policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed: pip install 'pi0-engine[ray]'"
)


class Running:
    """An application behind uvicorn, in a thread."""

    def __init__(self, load: Callable[[], Pi0Policy], options: ServiceOptions) -> None:
        self.service = Service(load, options)
        self.service.start()
        self.listening = socket.socket()
        self.listening.bind(("127.0.0.1", 0))
        self.listening.listen()
        self.port = self.listening.getsockname()[1]
        self.begun, self.metrics_fail = threading.Event(), False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self.begun.wait(PATIENCE_S)

    async def _serve(self) -> None:
        import uvicorn

        async def exposition() -> tuple[str, bytes]:
            if self.metrics_fail:
                raise TimeoutError("a detail that is nobody's business")
            return self.service.metrics.exposition()

        self.loop, self.application = asyncio.get_running_loop(), Application(self.service, Keys(), 50_000, exposition)
        config = uvicorn.Config(self.application, lifespan="on", log_config=None, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.begun.set()
        await self.server.serve(sockets=[self.listening])

    def close(self) -> None:
        """Say goodbye to everyone."""
        closing = self.application.close(GOING_AWAY, "bye")
        asyncio.run_coroutine_threadsafe(closing, self.loop).result(PATIENCE_S)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serving(load: Callable[[], Pi0Policy] = policy, **options: Any) -> Iterator[Running]:
    running = Running(load, ServiceOptions(**options))
    try:
        yield running
    finally:
        running.stop()


@contextlib.contextmanager
def connect(running: Running) -> Iterator[Any]:
    """A connection behind the greeting."""
    with websocket.connect(f"ws://127.0.0.1:{running.port}/any/path", compression=None) as connection:
        assert unpackb(connection.recv(PATIENCE_S))["server"] == "pi0-engine"
        yield connection


def test_sessions_of_their_own_and_room_for_so_many() -> None:
    with serving(seed=7, max_sessions=2) as running, connect(running) as one, connect(running) as other:
        noises = {0: np.random.default_rng((7, 0)), 1: np.random.default_rng((7, 1))}
        for connection, number in ((one, 0), (other, 1), (one, 0)):
            connection.send(packb(observation(seed=number)))
            expected = policy().infer(observation(seed=number), noise=noise(noises[number]))
            np.testing.assert_array_equal(unpackb(connection.recv(PATIENCE_S))["actions"], expected["actions"])
        with pytest.raises(websockets.exceptions.InvalidStatus) as caught, connect(running):
            pass
        assert caught.value.response.status_code == 503


def test_goodbye_and_messages_that_are_too_big() -> None:
    with serving() as running:
        for size, code in ((50_001, 1009), (None, 1001)):
            with connect(running) as connection:
                if size is None:
                    running.close()
                else:
                    connection.send("x" * size)
                with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
                    connection.recv(PATIENCE_S)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == code
        end = time.monotonic() + PATIENCE_S
        while b"pi0_sessions 0.0" not in running.service.metrics.exposition()[1]:
            assert time.monotonic() < end


def test_metrics_that_fail_say_so() -> None:
    with serving() as running, connect(running):
        address = f"http://127.0.0.1:{running.port}/metrics"
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as response:
            assert b"pi0_sessions 1.0" in response.read()
        running.metrics_fail = True
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(address, timeout=PATIENCE_S)
        assert caught.value.code == 500 and b"nobody" not in caught.value.read()


class Breakable(Pi0Policy):
    broken: threading.Event

    @classmethod
    def make(cls) -> Breakable:
        made = fresh_policy()
        made.__class__ = cls
        assert isinstance(made, cls)
        made.broken = threading.Event()
        return made

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.broken.is_set():
            raise RuntimeError("the GPU is lost")
        return super().infer(*args, **kwargs)


def test_a_policy_that_breaks_sends_everyone_away() -> None:
    """To another replica, while Ray, told by the health check, starts one in place of this."""
    made = Breakable.make()
    replica = Replica.__new__(Replica)
    with serving(lambda: made) as running, connect(running) as idle, connect(running) as asking:
        replica.service = running.service
        asyncio.run(replica.check_health())
        made.broken.set()
        asking.send(packb(observation()))
        assert "inference_failed" in asking.recv(PATIENCE_S)
        for connection in (asking, idle):
            with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
                connection.recv(PATIENCE_S)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1011
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused, connect(running):
            pass
        assert refused.value.response.status_code == 503
        with pytest.raises(RuntimeError, match="inference does not work any more: the GPU is lost"):
            asyncio.run(replica.check_health())

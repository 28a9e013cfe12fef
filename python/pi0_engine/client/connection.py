"""``PolicyClient``: a policy server's chunks over a websocket, with errors that a control loop can tell apart.

Speaks openpi's protocol, so openpi's server answers it too. What pi0-engine adds (deadlines, the observation's age,
real-time chunking, resets) is sent only to a server whose metadata says that it is one.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pi0_engine.client.errors import ConnectionLost, PolicyError
from pi0_engine.serving.wire import Limits, packb, unpackb

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

logger = logging.getLogger(__name__)

#: Beside the observation's keys: what is asked of a pi0-engine server.
_KEY = "pi0_engine"
#: A server is trusted more than its clients are: metadata may hold whatever its operator put there.
_LIMITS = Limits(depth=16, containers=10_000, length=100_000, key=100_000)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0


class PolicyClient:
    """A connection to a policy server that mends itself between requests.

    Safe to call from several threads; requests go one after another. A context manager.

    Args:
        uri: ``ws://host:port`` or ``wss://host:port``.
        api_key: sent as ``Authorization: Api-Key ...``.
        tls: for ``wss://`` to a server whose certificate the system does not know:
            ``ssl.create_default_context(cafile="server.pem")``.
        connect_timeout_s: for one attempt to connect.
        reply_timeout_s: how long to wait for a reply before the connection counts as lost. Above the slowest
            inference, the first one after the server's start included.
        reconnect_s: how long to try to connect, from the constructor too: attempts wait 0.1 s, 0.2 s, ... up to 5 s,
            each shortened at random, so that many robots do not come back at once. 0 is one attempt.
        max_size: of a message from the server, in bytes.
        ping_interval_s: keep-alive pings: a peer that is gone without a word is noticed after ``ping_timeout_s``.
        ping_timeout_s: see there.
        close_timeout_s: how long to wait for a goodbye.

    Attributes:
        metadata: what the server says about itself; renewed by a reconnection.

    Raises:
        ConnectionLost: nobody answered within ``reconnect_s``.
        PolicyError: ``unauthorized``.
        ValueError: a URI that is none, ``tls`` for ``ws://``, or a package of the extra ``serve`` that is missing.
    """

    def __init__(
        self,
        uri: str,
        api_key: str | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
        reply_timeout_s: float = 30.0,
        reconnect_s: float = 30.0,
        max_size: int = 16 << 20,
        ping_interval_s: float = 20.0,
        ping_timeout_s: float = 20.0,
        close_timeout_s: float = 1.0,
    ) -> None:
        if tls is not None and not uri.startswith("wss://"):
            raise ValueError(f"tls is given for {uri!r}, expected wss://...: nothing would be encrypted")
        self.uri = uri
        self.metadata: dict[str, Any] = {}
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._connect_timeout_s, self._reply_timeout_s = connect_timeout_s, reply_timeout_s
        self._reconnect_s = reconnect_s
        self._options: dict[str, Any] = {
            "compression": None,
            "max_size": max_size,
            "ping_interval": ping_interval_s,
            "ping_timeout": ping_timeout_s,
            "close_timeout": close_timeout_s,
            **({} if tls is None else {"ssl": tls}),
        }
        self._socket: ClientConnection | None = None
        self._names = itertools.count(1)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.connect()

    @property
    def is_pi0_engine(self) -> bool:
        """Whether the server understands more than openpi's protocol."""
        return self.metadata.get("server") == "pi0-engine"

    @property
    def session(self) -> str | None:
        """The server's name for this connection; another one after a reconnection. None from other servers."""
        return self.metadata.get("session")

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        socket = self._socket
        return socket is not None and _is_open(socket)

    def connect(self) -> None:
        """Connect where there is no connection, within ``reconnect_s``; :meth:`infer` does so by itself.

        Call it before an observation is taken, so that the observation does not age meanwhile.

        Raises:
            ConnectionLost: nobody answered in time, or the client was closed.
            PolicyError: ``unauthorized``, at once.
        """
        with self._lock:
            self._connect()

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        deadline_ms: float | None = None,
        age_ms: float | None = None,
        rtc: Mapping[str, int] | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Send an observation and wait for its reply.

        Args:
            observation: by the server's keys. A value may be an array, a number or text.
            deadline_ms: the answer is wanted this long after the server received it; it does not begin later.
            age_ms: how old the observation is. Time that this call spends on connecting is added.
            rtc: continue a chunk: ``executed``, ``delay`` and ``sequence`` of docs/serving.md.
            seed: of the noise, from this request on.

            The last four are for pi0-engine's server; others never see them.

        Returns:
            The server's reply: ``actions`` float32 [H, A], ``policy_timing``, ``server_timing``, ...

        Raises:
            PolicyError: the server refused or failed.
            ConnectionLost: the connection broke or the reply did not come; the next call connects anew.
            ValueError: an observation that cannot be sent.
        """
        with self._lock:
            started = time.monotonic()
            if self._connect():
                age_ms = (age_ms or 0.0) + 1e3 * (time.monotonic() - started)
            asked = {"deadline_ms": deadline_ms, "age_ms": age_ms, "rtc": dict(rtc) if rtc else None, "seed": seed}
            return self._exchange(observation, {key: value for key, value in asked.items() if value is not None})

    def reset(self) -> None:
        """Begin a new episode: the server forgets the session's chunks. Nothing to do for other servers.

        Raises:
            PolicyError, ConnectionLost: as :meth:`infer`.
        """
        with self._lock:
            # A new connection is a new session, which needs no reset.
            if not self._connect() and self.is_pi0_engine:
                self._exchange({}, {"reset": True})

    def close(self) -> None:
        """Say goodbye; a request that is waiting in another thread ends with ConnectionLost."""
        self._closed.set()
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, observation: Mapping[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        message = dict(observation)
        name = next(self._names)
        if self.is_pi0_engine:
            if _KEY in message:
                raise ValueError(f"the observation has the key {_KEY!r}, which is the protocol's own")
            message[_KEY] = {"request": name, **asked}
        data = packb(message)
        socket = self._socket
        if socket is None:
            raise ConnectionLost(f"the connection to {self.uri} was closed")
        try:
            socket.send(data)
            reply = _read(socket.recv(self._reply_timeout_s), name)
        except PolicyError:
            raise
        except BaseException as error:
            # Whatever it was, a late reply must not be taken for that of the next request.
            self._drop()
            if isinstance(error, (TimeoutError, OSError, ValueError)) or _is_websocket_error(error):
                raise ConnectionLost(f"{self.uri}: {_explain(error, self._reply_timeout_s)}") from error
            raise
        return reply

    def _connect(self) -> bool:
        """Whether that needed a new connection."""
        if self.connected:
            return False
        self._drop()
        until, waits = time.monotonic() + self._reconnect_s, _waits()
        while True:
            if self._closed.is_set():
                raise ConnectionLost(f"the client of {self.uri} is closed")
            try:
                self._socket = self._open()
                if self._closed.is_set():  # by another thread, just now
                    self._drop()
                    continue
                return True
            except ConnectionLost as error:
                wait = next(waits)
                if time.monotonic() + wait > until:
                    raise
                logger.info("%s; next attempt in %.1f s", error, wait)
                self._closed.wait(wait)

    def _open(self) -> ClientConnection:
        """One attempt."""
        client, exceptions = _websockets()
        try:
            # Entered, and left by close(): websockets 17 warns of connections that are not.
            socket: ClientConnection = client.connect(
                self.uri, additional_headers=self._headers, open_timeout=self._connect_timeout_s, **self._options
            ).__enter__()
        except exceptions.InvalidURI as error:
            raise ValueError(f"{self.uri!r} is not a websocket URI, expected ws://host:port or wss://...") from error
        except exceptions.InvalidStatus as error:
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace").strip()
            if status in (401, 403):
                raise PolicyError("unauthorized", f"{self.uri} refused the API key: {body or status}") from error
            raise ConnectionLost(f"{self.uri} answers HTTP {status}: {body[:200]}") from error
        except (OSError, exceptions.WebSocketException) as error:
            raise ConnectionLost(f"cannot connect to {self.uri}: {error}") from error
        try:
            metadata = unpackb(_binary(socket.recv(self._connect_timeout_s)), _LIMITS)
            if not isinstance(metadata, dict):
                raise ValueError(f"its metadata is {type(metadata).__name__}, expected a map")
        except BaseException as error:
            socket.close()
            if isinstance(error, (OSError, ValueError, PolicyError, exceptions.WebSocketException)):
                reason = _explain(error, self._connect_timeout_s)
                raise ConnectionLost(f"{self.uri} does not greet as a policy server: {reason}") from error
            raise
        for key in ("robot", "action_dim"):
            if self.metadata and self.metadata.get(key) != metadata.get(key):
                socket.close()
                was, now = self.metadata.get(key), metadata.get(key)
                raise PolicyError("server_changed", f"{self.uri} came back with {key} {now!r}, it was {was!r}")
        self.metadata = metadata
        return socket

    def _drop(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()


def _read(frame: str | bytes, name: int) -> dict[str, Any]:
    """A reply, or the error that it is."""
    reply = unpackb(_binary(frame), _LIMITS)
    if not isinstance(reply, dict) or reply.get("request", name) != name:
        raise ValueError("it is no reply to the request")
    return reply


def _binary(frame: str | bytes) -> bytes:
    """A binary frame; a text frame is an error: JSON from pi0-engine, a traceback from openpi."""
    if isinstance(frame, bytes):
        return frame
    try:
        error = json.loads(frame)
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        raise PolicyError("server_error", frame.strip()) from None
    raise PolicyError(code, message)


def _waits() -> Iterator[float]:
    """Seconds between attempts: doubled each time up to a limit, shortened by up to a half at random."""
    wait = _FIRST_WAIT_S
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _is_open(socket: ClientConnection) -> bool:
    from websockets.protocol import State

    return socket.protocol.state is State.OPEN


def _explain(error: BaseException, timeout_s: float) -> str:
    return f"no reply within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)


def _is_websocket_error(error: BaseException) -> bool:
    return isinstance(error, _websockets()[1].WebSocketException)


def _websockets() -> tuple[Any, Any]:
    try:
        from websockets import exceptions
        from websockets.sync import client
    except ImportError:
        raise ValueError("a policy client needs websockets: pip install 'pi0-engine[serve]'") from None
    return client, exceptions

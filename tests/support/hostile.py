"""Seeded hostility: messages and connections that no robot makes, each with what it must come to. For the fuzzer."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from pi0_engine.serving.server import _OPEN_S
from pi0_engine.serving.wire import packb
from tests.support.serving import PATIENCE_S, observation

Random = np.random.Generator

#: Array maps that must not become arrays.
_ARRAYS: list[dict[bytes, Any]] = [
    {b"data": bytes(8), b"dtype": "|O", b"shape": [1]},
    {b"data": bytes(8), b"dtype": "<f4", b"shape": [2**40, 2**40]},
    {b"data": bytes(8), b"dtype": "<f4", b"shape": [3]},
    {b"data": bytes(8), b"dtype": "<f4", b"shape": [-1]},
    {b"data": bytes(8), b"dtype": "<f4,|O", b"shape": [1]},
    {b"data": bytes(8), b"dtype": ">f8", b"shape": [1]},
    {b"data": bytes(8), b"dtype": "<M8[s]", b"shape": [1]},
    {b"data": bytes(8), b"dtype": "<U2", b"shape": [1]},
    {b"data": "text", b"dtype": "|u1", b"shape": [4]},
    {b"data": bytes(8), b"dtype": "<f4"},
    {b"data": bytes(1), b"dtype": "|u1", b"shape": [1] * 40},
    {b"data": b"", b"dtype": "|u1", b"shape": [0, 2**62]},
]

_VALUES: list[Any] = [
    *(None, True, -1, 2**63, 1e308, float("nan"), float("inf"), np.int64(5)),
    *("", "x" * 10_000, "\x00", b"\xff\xfe", [], {}, [[]], {"a": {"b": 1}}),
    *(np.zeros(0), np.zeros((8, 1)), np.zeros(8, np.bool_)),
    *(np.full(8, number) for number in (np.nan, np.inf, 1e38, 1e300, 1e308)),
    *(np.zeros(shape, np.uint8) for shape in ((0, 0, 3), (1, 1, 3), (8, 8, 4))),
    *(np.zeros(shape, np.uint8) for shape in ((3, 20_000, 3), (20_000, 1, 3), (2**20 + 1, 1, 3))),
    *(np.full((8, 8, 3), np.nan, np.float32), np.full((8, 8, 3), 255.0)),
]

_CONTROLS: list[Any] = [
    *(3, None, [], {"x": 1}, {"reset": "yes"}, {"request": {"a": 1}}, {"request": "r" * 1000}),
    *({"deadline_ms": value} for value in (-1, 0, float("nan"), "soon")),
    *({"age_ms": "old"}, {"seed": -5}, {"seed": 2**64 - 1}),
    *({"rtc": value} for value in ([], {"executed": -1}, {"executed": 2, "delay": 1})),
    *({"rtc": {"executed": 10**9, "delay": 10**9}}, {"rtc": {"executed": 0, "delay": 5, "sequence": 10**12}}),
]


def valid(random: Random) -> dict[str, Any]:
    return observation(seed=int(random.integers(1 << 30)))


def _random_bytes(random: Random) -> bytes:
    return random.bytes(int(random.integers(0, 400)))


def _cut_short(random: Random) -> bytes:
    whole = packb(valid(random))
    return whole[: int(random.integers(len(whole)))]


def _flipped(random: Random) -> bytes:
    whole = bytearray(packb(valid(random)))
    # Mostly in the structure, where a flip counts; pixels are most of the bytes.
    for _ in range(int(random.integers(1, 4))):
        whole[int(random.integers(200 if random.random() < 0.8 else len(whole)))] = int(random.integers(256))
    return bytes(whole)


def _structure(random: Random) -> bytes:
    kinds: list[Callable[[], bytes]] = [
        lambda: b"\x91" * int(random.integers(1, 5000)),
        lambda: b"\xdd\xff\xff\xff\xff" + random.bytes(20),
        lambda: b"\xdf\x7f\xff\xff\xff" + random.bytes(20),
        lambda: b"\xc6\xff\xff\xff\xf0" + random.bytes(20),
        lambda: msgpack.packb([[]] * 200 + [[[]] * 200] * 50),
        lambda: msgpack.packb({"x" * 1000 + str(k): k for k in range(250)}),
        lambda: b"\xdc\x01\x00" * 300,
        lambda: b"\xc7\x08\x05" + bytes(8),
        lambda: b"\xd6\xff" + bytes(4),
    ]
    return kinds[int(random.integers(len(kinds)))]()


def _bad_array(random: Random) -> bytes:
    tree: dict[Any, Any] = {"observation/state": {b"__ndarray__": True, **_ARRAYS[int(random.integers(len(_ARRAYS)))]}}
    if random.random() < 0.5:
        tree["observation/image"] = {b"__npgeneric__": True, b"data": "x", b"dtype": "|O"}
    return bytes(msgpack.packb(tree))


def _bad_value(random: Random) -> bytes:
    tree = valid(random)
    key = sorted(tree)[int(random.integers(len(tree)))]
    value = _VALUES[int(random.integers(len(_VALUES)))]
    chance = random.random()
    if chance < 0.6:
        tree[key] = value
    elif chance < 0.8:
        del tree[key]
    else:
        tree[str(random.integers(1000))] = value
    return packb(tree)


def _bad_controls(random: Random) -> bytes:
    return packb({**valid(random), "pi0_engine": _CONTROLS[int(random.integers(len(_CONTROLS)))]})


def _text(random: Random) -> str:
    return random.bytes(int(random.integers(100))).decode("latin-1")


MESSAGES: list[Callable[[Random], bytes | str]] = [
    _random_bytes, _cut_short, _flipped, _flipped, _structure, _bad_array, _bad_value, _bad_value, _bad_controls, _text,
]  # fmt: skip


def message(random: Random) -> bytes | str:
    """One message that a server must refuse with a code, or, should it be usable after all, answer."""
    return MESSAGES[int(random.integers(len(MESSAGES)))](random)


_UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


#: How connections are broken, by what is sent, and what must come of it: a status before the websocket is open, a close
#: code after it. None stands for a connection that ends with or without a word.
_HTTP: list[Callable[[Random], bytes]] = [
    lambda random: random.bytes(500),
    lambda random: b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 100_000,
    lambda random: b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    lambda random: _UPGRADE[: int(random.integers(len(_UPGRADE)))],
]
_FRAMES: list[tuple[bytes, int | None]] = [
    (b"\x82\x05" + bytes(5), 1002),  # not masked
    (b"\xbf\x80" + bytes(4), 1002),  # a reserved opcode
    (b"\x82\xff" + struct.pack(">Q", 2**62) + bytes(4), 1009),  # 4 EB announced
    (b"\x81\x82" + bytes(4) + b"\xff\xfe", 1007),  # text that is not UTF-8
    (b"\x82\xfe\xff\xff" + bytes(4) + bytes(1000), None),  # the rest never comes
]


def abuse_connection(port: int, random: Random, number: int) -> str:
    """A connection that breaks HTTP or websocket rules, or is left without a goodbye: the kinds in turn.

    Returns how the server ended it: an HTTP status, a close code, ``closed`` without either, or ``left`` if this side
    did. Raises AssertionError if it ended it otherwise than it must, or not at all.
    """
    turn, kind = divmod(number, len(_HTTP) + len(_FRAMES))
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        code = None
        if kind < len(_HTTP):
            with contextlib.suppress(ConnectionError):  # the server need not read all of it
                connection.sendall(_HTTP[kind](random))
        else:
            connection.sendall(_UPGRADE)
            _open(connection)
            frame, code = _FRAMES[kind - len(_HTTP)]
            connection.sendall(frame)
        if turn % 2:  # a reset in place of a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return "left"
        if code is None:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_WR)
        ending = _ending(connection) if kind < len(_HTTP) else _close_code(connection)
        if code is not None:
            assert ending == str(code), f"a broken frame (kind {kind}) ended its connection with {ending}"
        return ending


def _open(connection: socket.socket) -> None:
    """Read the answer to the handshake, byte by byte so that nothing of the frames behind it is taken."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, f"no websocket was opened: {head!r}"
        head += byte
    assert head.startswith(b"HTTP/1.1 101 "), head


def _rest(connection: socket.socket) -> bytes:
    """All that comes before the connection ends. TimeoutError if it does not end."""
    received = b""
    with contextlib.suppress(ConnectionResetError):  # an end, too
        while more := connection.recv(65536):
            received += more
    return received


def _ending(connection: socket.socket) -> str:
    answer = _rest(connection)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    return answer.split()[1].decode() if answer else "closed"


def _close_code(connection: socket.socket) -> str:
    """Of the close frame among the server's frames, which are short: pings, and the greeting with 16 bits of length."""
    frames = _rest(connection)
    while frames:
        length, head = frames[1], 2
        if length == 126:
            length, head = int.from_bytes(frames[2:4], "big"), 4
        assert length < 127 or head == 4, "a frame that no server of ours sends"
        if frames[0] == 0x88:
            return str(int.from_bytes(frames[head : head + 2], "big"))
        frames = frames[head + length :]
    return "closed"


def leave_handshakes_open(port: int, until: Callable[[], bool]) -> None:
    """Connections that send nothing, or half a handshake, are closed when its time is up; again and again."""
    while True:
        with contextlib.ExitStack() as stack:
            connections = []
            for begun in (b"", _UPGRADE[:20], _UPGRADE[:-2]):
                connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
                connections.append(stack.enter_context(connection))
                connection.sendall(begun)
            # Nothing else would end them: the pings that notice a lost client begin with the websocket.
            end = time.monotonic() + 2 * _OPEN_S
            for connection in connections:
                connection.settimeout(max(0.01, end - time.monotonic()))
                _ending(connection)
        if until():
            return


def hold_connections(port: int, count: int, until: Callable[[], bool]) -> None:
    """Slow senders and clients that never read, held open at once."""
    held: list[socket.socket] = []
    try:
        for number in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            held.append(connection)
            connection.sendall(_UPGRADE)
            if number % 2:
                connection.sendall(b"\x82\xff" + struct.pack(">Q", 5_000_000) + bytes(4))
        while not until():
            time.sleep(0.2)
            for number, connection in enumerate(held):
                if number % 2:
                    with contextlib.suppress(OSError):
                        connection.sendall(bytes(10))
    finally:
        for connection in held:
            connection.close()

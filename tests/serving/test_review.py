"""What a sloppy or hostile client, an operator's mistake or a dying policy must not be able to do."""

from __future__ import annotations

import json
import socket
import ssl
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client as websocket

import pi0_engine.serving.server as server_module
import pi0_engine.serving.service as service_module
from pi0_engine.cli import main
from pi0_engine.inputs import NotFiniteError
from pi0_engine.recording.files import Record
from pi0_engine.recording.recorder import Recorder, describe_policy
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.observation import read_observation
from pi0_engine.serving.access import Keys
from pi0_engine.serving.background import BackgroundServer
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.protocol import SERVER_KEYS, read_request
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service, ServiceOptions
from pi0_engine.serving.wire import packb, unpackb
from tests.support.clients import Gated, ask, connect, http, reply
from tests.support.serving import PATIENCE_S, SIZES, certificate, needs_torch, noise, observation, policy, serving

_UPGRADE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def handshake(port: int, *headers: bytes) -> bytes:
    """The status line that a handshake with these headers gets."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(h + b"\r\n" for h in headers) + _UPGRADE + b"\r\n")
        return raw.recv(65536).partition(b"\r\n")[0]


# What one message may cost.

BOMBS = {
    "a long key in front of many": {"\x01" * 1_000_000: {str(k): 0 for k in range(250)}},
    "long keys": {"\x01" * 50_000 + str(k): 0 for k in range(250)},
    "one long text in a list": {"observation/state": ["a" * 1_000_000] + [""] * 255},
    "long bytes in a list": {"observation/state": [b"a" * 4_000_000] + [b""] * 255},
    "text deep in lists": {"observation/image": [[["a" * 1_000_000, *[""] * 255]]]},
    "many keys": {f"{outer:0120}": {f"{k:0120}": 0 for k in range(250)} for outer in range(100)},
    "bytes for a map": {"pi0_engine": bytes(4_000_000)},
    "bytes for a shape": {
        "x": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [bytes(4_000_000)]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_message_costs_no_more_than_a_few_times_its_size(name: str) -> None:
    given = {key: value for key, value in observation().items() if not key.startswith("observation/state")}
    plain = {key: msgpack.unpackb(packb({"": value}))[""] for key, value in given.items()}
    data = msgpack.packb({**plain, **BOMBS[name]})
    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as caught:
            read_request(data, get_robot("libero"))
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()
    assert len(caught.value.to_json()) < 5_000


def test_a_key_that_is_there_twice_is_refused() -> None:
    """Nested and with a slash: one of the two would silently be ignored."""
    given = {**observation(), "observation": {"state": np.zeros(8)}}
    with pytest.raises(ValueError, match="'observation/state' is there twice"):
        read_observation(given, get_robot("libero"))


# The handshake.


def test_two_keys_in_one_handshake_are_none(caplog: pytest.LogCaptureFixture) -> None:
    with serving(keys=Keys((b"right",))) as running:
        right = b"Authorization: Api-Key right"
        assert handshake(running.port, right) == b"HTTP/1.1 101 Switching Protocols"
        assert handshake(running.port, right, right) == b"HTTP/1.1 401 Unauthorized"
    assert "process_request failed" not in caplog.text


@pytest.mark.parametrize("knock", [b"", b"\x16\x03\x01\r\n\r\n", b"HEAD /healthz HTTP/1.1\r\n\r\n", b"GET /"])
def test_who_knocks_does_not_fill_the_log(knock: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as raw:
            raw.sendall(knock)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65536):
                pass
        assert http(running.port, "/readyz")[0] == 200
    assert caplog.text == ""


def test_a_web_page_cannot_reach_a_server_without_keys() -> None:
    """A browser on the robot's machine would connect to loopback for any page that asks it to."""
    origin = b"Origin: https://example.org"
    with serving() as running:
        assert handshake(running.port, origin) == b"HTTP/1.1 403 Forbidden"
        assert handshake(running.port) == b"HTTP/1.1 101 Switching Protocols"
    with serving(keys=Keys((b"right",))) as running:  # which no page knows
        assert handshake(running.port, origin, b"Authorization: Api-Key right").endswith(b"101 Switching Protocols")


@pytest.mark.parametrize("kind", [b"\x02", b"\x01"])
def test_a_message_of_countless_fragments_is_cut_off(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty ones, which count nothing towards its size. Not every version of websockets counts them."""
    monkeypatch.setattr("websockets.asyncio.messages.MAX_FRAGMENTS", 10**9, raising=False)
    with serving() as running, connect(running.port) as connection:
        empty = b"\x80" + bytes(4)
        connection.socket.sendall(kind + empty + (b"\x00" + empty) * 4096)
        with pytest.raises(websockets.exceptions.ConnectionClosedError) as caught:
            connection.recv(PATIENCE_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
    with serving() as running, connect(running.port) as connection:  # in parts, with an empty one, it is fine
        data = packb(observation())
        connection.send([data[:10], b"", data[10:]])
        assert "actions" in reply(connection)
        connection.send(["te", "xt"])
        assert reply(connection)["message"] == "the message is text, expected binary msgpack"


def test_keys_do_not_show() -> None:
    assert "sesame" not in repr(ServerOptions(keys=Keys((b"sesame",))))


def test_who_never_begins_tls_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_OPEN_S", 0.2)
    cert, key = certificate(tmp_path, "-nodes")
    with (
        serving(tls_cert=cert, tls_key=key) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as silent,
    ):
        assert silent.recv(1) == b""


def test_who_never_ends_tls_does_not_hold_up_the_server(tmp_path: Path) -> None:
    """A websocket that answers nothing any more: neither the server's goodbye nor the end of TLS."""
    cert, key = certificate(tmp_path, "-nodes")
    running = serving(tls_cert=cert, tls_key=key)
    with (
        running,
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as plain,
        ssl.create_default_context(cafile=cert).wrap_socket(plain, server_hostname="127.0.0.1") as silent,
    ):
        silent.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + _UPGRADE + b"\r\n")
        assert silent.recv(12) == b"HTTP/1.1 101"
        ended = threading.Thread(target=running.stop)
        ended.start()
        ended.join(PATIENCE_S)
        assert not ended.is_alive()


def test_a_key_file_with_a_passphrase_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "-passout", "pass:secret")
    with pytest.raises(ValueError, match="cannot use"):
        ServerOptions(tls_cert=cert, tls_key=key).tls()


# What an operator says.


@needs_torch
@pytest.mark.parametrize(("option", "error"), [("--api-key-file", "cannot read the API keys"), ("--record", "record")])
def test_an_empty_name_is_not_none(option: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a unit file's unset variable gives it: it must not open the server, or lose the recording."""
    sizes = json.dumps(SIZES)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(sizes)
        file.flush()
        arguments = ["serve", "--robot", "libero", "--random-weights", "0", "--config", file.name, "--port", "0"]
        assert main([*arguments, option, ""]) == 2
    assert error in capsys.readouterr().err


def test_a_byte_order_mark_is_not_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\ufeffright\n", encoding="utf-8")
    assert Keys.read(tmp_path / "keys").keys == (b"right",)


def test_metadata_cannot_contradict_the_server() -> None:
    with pytest.raises(ValueError, match=r"\['protocol', 'session'\], which the server says itself"):
        ServiceOptions(metadata={"session": "mine", "protocol": 7, "reset_pose": [0.0]})
    with serving() as running, websocket.connect(f"ws://127.0.0.1:{running.port}", compression=None) as connection:
        assert set(unpackb(connection.recv(PATIENCE_S))) == SERVER_KEYS


@pytest.mark.parametrize("value", [2**64, "\ud800", {1, 2}])
def test_metadata_that_cannot_be_sent_is_refused_at_the_start(value: Any) -> None:
    with pytest.raises(ValueError, match="metadata"):
        ServiceOptions(metadata={"a": value})


@pytest.mark.parametrize("option", ["max_message_mb", "drain_s"])
def test_endless_is_no_option(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        ServerOptions(**{option: float("inf")})


# Sessions.


def test_the_seed_of_a_message_that_only_resets_counts() -> None:
    with serving() as running, connect(running.port) as connection:
        assert ask(connection, pi0_engine={"reset": True, "seed": 5})["reset"]
        expected = policy().infer(observation(), noise=noise(np.random.default_rng(5)))["actions"]
        np.testing.assert_array_equal(ask(connection, **observation())["actions"], expected)


class HeldUp(Recorder):
    """Holds the inference thread up behind the policy, where the reply is on its way out."""

    entered, gate = threading.Semaphore(0), threading.Event()

    def write(self, record: Record) -> bool:
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        return super().write(record)


def test_no_actions_of_the_old_episode_follow_the_answer_to_a_reset(tmp_path: Path) -> None:
    service = Service(policy, record=lambda loaded: HeldUp(tmp_path / "recorded", describe_policy(loaded)))
    with BackgroundServer(service, ServerOptions(port=0)) as running, connect(running.port) as connection:
        connection.send(packb({**observation(), "pi0_engine": {"request": "old"}}))
        assert HeldUp.entered.acquire(timeout=PATIENCE_S)
        assert ask(connection, pi0_engine={"reset": True})["reset"]
        HeldUp.gate.set()
        late = reply(connection)
        assert late["code"] == "superseded" and late["request"] == "old"
        assert ask(connection, **observation())["session"]["epoch"] == 1


# Faults inside.


def test_a_fault_beside_inference_is_answered_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> Any:
        raise ZeroDivisionError("a detail that is nobody's business")

    with serving() as running, connect(running.port) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(service_module, "read_request", broken)
            answer = ask(connection, **observation())
        assert answer == {"code": "inference_failed", "message": "an error inside the server; its log says more"}
        assert "ZeroDivisionError" in caplog.text
        assert "actions" in ask(connection, **observation())


@pytest.mark.parametrize("fault", [NotFiniteError("NaN"), SystemExit(3)])
def test_a_policy_that_is_lost_is_noticed_however_it_fails(fault: BaseException) -> None:
    """Also one that only computes NaN from now on, and one whose thread would end without a word."""
    gated = Gated.make()
    failures: list[Any] = gated.failures
    with serving(lambda: gated) as running, connect(running.port) as connection:
        failures.extend([fault] * 2)
        assert ask(connection, **observation())["code"] in ("not_finite", "inference_failed")
        with pytest.raises(RuntimeError, match="inference does not work any more"):
            running.ended.result(PATIENCE_S)
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            connection.recv(PATIENCE_S)


def test_nan_from_one_observation_ends_nothing() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        gated.failures.append(NotFiniteError("NaN"))
        assert ask(connection, **observation())["code"] == "not_finite"
        assert "actions" in ask(connection, **observation())
        assert http(running.port, "/readyz")[0] == 200


class Changing(dict[str, Any]):
    """A map that somebody else changes while it is read."""

    def items(self) -> Any:
        raise RuntimeError("dictionary changed size during iteration")


def test_a_record_that_cannot_be_read_is_dropped_and_nothing_else_happens(tmp_path: Path) -> None:
    with Recorder(tmp_path / "recorded", {"test": 1}) as recorder:
        assert not recorder.write(Record(observation=Changing(a=1), reply={}, seed=0))
        assert recorder.write(Record(observation={"a": 1}, reply={}, seed=0))
    assert (recorder.written, recorder.dropped) == (1, 1)

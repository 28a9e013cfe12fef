"""The command as a process: signals, and what is killed without warning."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client as websocket
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from pi0_engine.cli import main
from pi0_engine.client import ConnectionLost, PolicyClient
from pi0_engine.serving.wire import packb, unpackb
from tests.support.serving import PATIENCE_S, needs_torch, noise, observation, policy, process

#: An instruction on which the policy below computes for ever.
ENDLESS = "count the stars"
#: The command with such a policy; it says so when it has begun.
ENDLESS_POLICY = f"""
import sys, torch
from pi0_engine.cli import main
from pi0_engine.policy import Pi0Policy

def infer(policy, observation, _infer=Pi0Policy.infer, **options):
    if getattr(observation, "prompt", None) == "{ENDLESS}":
        print("computing", flush=True)
        while True:
            torch.ones(64, 64) @ torch.ones(64, 64)
    return _infer(policy, observation, **options)

Pi0Policy.infer = infer
sys.exit(main())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@needs_torch
def test_a_killed_server_is_noticed_and_a_new_one_serves_on(tmp_path: Path) -> None:
    port = free_port()
    with process(tmp_path, port=port) as (server, _):
        client = WebsocketClientPolicy("127.0.0.1", port)
        assert client.infer(observation())["actions"].shape == (10, 7)
        server.send_signal(signal.SIGKILL)
        with pytest.raises(websockets.exceptions.ConnectionClosedError):
            client.infer(observation())
    with process(tmp_path, port=port):
        client = WebsocketClientPolicy("127.0.0.1", port)
        answer = client.infer(observation())
        assert answer["session"]["sequence"] == 1  # nothing of the old session is left


@needs_torch
def test_a_server_killed_with_an_answer_outstanding_is_noticed_and_survived(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        with (
            process(tmp_path, port=port, program=["-c", ENDLESS_POLICY]) as (server, _),
            websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as other,
        ):
            other.recv(PATIENCE_S)
            client = stack.enter_context(PolicyClient(f"ws://127.0.0.1:{port}"))
            before = client.session
            occupy(server, other)
            outstanding = pool.submit(client.infer, observation(seed=1), seed=1)
            wait_until_one_waits(port)
            server.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionLost):
                outstanding.result(PATIENCE_S)
            with pytest.raises(websockets.exceptions.ConnectionClosedError):
                other.recv(PATIENCE_S)
        with process(tmp_path, port=port):
            answer = client.infer(observation(seed=1), seed=1)  # the same client, on a connection of its own making
            assert answer["session"]["sequence"] == 1 and client.session not in (None, before)
            expected = policy().infer(observation(seed=1), noise=noise(np.random.default_rng(1)))
            np.testing.assert_allclose(answer["actions"], expected["actions"], rtol=0, atol=1e-5)


CLIENT = """
import sys, time
import websockets.sync.client as websocket
with websocket.connect(sys.argv[1], compression=None) as connection:
    connection.recv()
    message = sys.stdin.buffer.read()
    connection.send(message)
    print("sent", flush=True)
    time.sleep(600)
"""


@needs_torch
def test_a_client_killed_in_the_middle_of_a_request_leaves_nothing_behind(tmp_path: Path) -> None:
    with process(tmp_path) as (server, port):
        address = f"ws://127.0.0.1:{port}"
        for _ in range(3):
            command = [sys.executable, "-c", CLIENT, address]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
                assert client.stdin is not None and client.stdout is not None
                client.stdin.write(packb(observation()))
                client.stdin.close()
                assert client.stdout.readline() == b"sent\n"
                client.kill()
        with websocket.connect(address, compression=None) as connection:
            connection.recv(PATIENCE_S)
            connection.send(packb(observation()))
            answer = unpackb(connection.recv(PATIENCE_S))
            assert answer["session"]["sequence"] == 1 and answer["actions"].shape == (10, 7)
            end = time.monotonic() + PATIENCE_S
            while "pi0_sessions 1.0" not in _metrics(port) and time.monotonic() < end:
                time.sleep(0.05)
            assert "pi0_sessions 1.0" in _metrics(port)  # this one
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def _metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
        return str(response.read().decode())


def occupy(server: Any, connection: Any) -> None:
    """Return when the engine of a server with the endless policy is certainly at work, for this connection."""
    connection.send(packb({**observation(), "prompt": ENDLESS, "pi0_engine": {"request": "endless"}}))
    assert server.stdout.readline() == "computing\n"


def wait_until_one_waits(port: int) -> None:
    """Return when a session waits for the engine."""
    end = time.monotonic() + PATIENCE_S
    while "pi0_waiting 1.0" not in _metrics(port):
        assert time.monotonic() < end


@needs_torch
def test_a_drain_that_runs_out_of_time_ends_the_process_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The inference thread cannot be ended; the interpreter's own end would run into it and abort."""
    recorded = tmp_path / "recorded"
    options = ["--drain-s", "0.05", "--record", str(recorded), "--verbose"]
    with (
        process(tmp_path, *options, program=["-c", ENDLESS_POLICY]) as (server, port),
        websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection,
    ):
        connection.recv(PATIENCE_S)
        connection.send(packb({**observation(), "pi0_engine": {"request": "answered"}}))
        assert unpackb(connection.recv(PATIENCE_S))["request"] == "answered"
        occupy(server, connection)
        connection.send(packb({**observation(), "pi0_engine": {"request": "waiting"}}))
        wait_until_one_waits(port)
        server.send_signal(signal.SIGTERM)
        refused = json.loads(connection.recv(PATIENCE_S))
        assert (refused["code"], refused["request"]) == ("shutting_down", "waiting")
        with pytest.raises(websockets.exceptions.ConnectionClosedOK) as caught:
            connection.recv(PATIENCE_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
        assert server.wait(PATIENCE_S) == 1
    log = (tmp_path / "log").read_text()
    assert "answers were still under way after 0.05 s" in log and "terminate called" not in log
    assert f"recorded 1 inferences into {recorded}" in log  # the recorder was closed
    assert main(["replay", str(recorded), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"] == 1


def wait_until_closed(port: int) -> None:
    """Return when a server takes no more connections: it drains."""
    end = time.monotonic() + PATIENCE_S
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < end:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
            time.sleep(0.02)


@needs_torch
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with (
        process(tmp_path, program=["-c", ENDLESS_POLICY]) as (server, port),
        websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection,
    ):
        connection.recv(PATIENCE_S)
        occupy(server, connection)
        server.send_signal(signal.SIGINT)
        wait_until_closed(port)
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == -signal.SIGINT


def test_what_cannot_be_served_is_said_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        assert main(["serve", "--robot", "libero", *arguments]) == 2
        return capsys.readouterr().err

    assert "expected exactly one of --checkpoint and --random-weights" in error("--port", "0")
    assert "no key is asked" in error("--host", "0.0.0.0", "--random-weights", "0")
    assert "cannot read the API keys" in error("--api-key-file", str(tmp_path / "none"))
    assert "both --tls-cert and --tls-key" in error("--tls-cert", "cert.pem")
    (tmp_path / "list.json").write_text("[1]")
    assert "expected an object" in error("--metadata", str(tmp_path / "list.json"))
    assert "max_waiting is 0" in error("--max-waiting", "0")
    assert main(["serve", "--robot", "r2d2", "--random-weights", "0"]) == 2
    assert "r2d2" in capsys.readouterr().err


@needs_torch
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_served_is_recorded_and_replayed(
    tmp_path: Path, end: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "recorded"
    with process(tmp_path, "--record", str(recorded)) as (server, port):
        with websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
            connection.recv(PATIENCE_S)
            for number in range(6):
                rtc = {"rtc": {"executed": 2, "delay": 1}} if number > 2 else {}
                connection.send(packb({**observation(seed=number), "pi0_engine": {"request": number, **rtc}}))
                assert unpackb(connection.recv(PATIENCE_S))["request"] == number
        deadline = time.monotonic() + PATIENCE_S
        while end == signal.SIGKILL and len(list(recorded.rglob("*.safetensors"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.send_signal(end)
        server.wait(PATIENCE_S)
    assert main(["replay", str(recorded), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and result["compared"] >= (6 if end == signal.SIGTERM else 5)
    assert main(["replay", str(recorded), "--json", "--random-weights", "1"]) == 1  # other weights, other actions

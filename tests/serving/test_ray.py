"""A fleet of two replicas as its clients see it: one address, sessions that do not mix, a replica that is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client as websocket
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from pi0_engine.cli import main
from pi0_engine.serving.wire import packb, unpackb
from tests.support.serving import PATIENCE_S, noise, observation, one_thread, policy, process

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'pi0-engine[ray]'"
)

KEY = "the right key"
HEADERS = {"Authorization": f"Api-Key {KEY}"}
CLIENTS = 8
SESSIONS = 16  # of each replica: room for all clients and what the tests before have left


@dataclass(frozen=True)
class Fleet:
    process: Any
    port: int
    log: Path

    def connect(self, **headers: str) -> Any:
        """A context manager: the connection, before its greeting is read."""
        return websocket.connect(
            f"ws://127.0.0.1:{self.port}",
            compression=None,
            additional_headers=headers or HEADERS,
            open_timeout=PATIENCE_S,
        )

    def greeting_replica(self) -> str:
        """Name of the replica that a new client gets."""
        with self.connect() as connection:
            return str(unpackb(connection.recv(PATIENCE_S))["replica"])

    def http(self, path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def replicas(self) -> set[str]:
        """Names of the replicas that answer."""
        text = self.http("/metrics", **HEADERS)[1]
        lines = [line for line in text.splitlines() if line.startswith("pi0_sessions{")]
        return {line.partition('replica="')[2].partition('"')[0] for line in lines}

    def workers(self) -> list[int]:
        """Process ids of the replicas."""
        return [pid for pid in descendants(self.process.pid) if command_of(pid).startswith("ray::ServeReplica")]


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    """As the replicas have: what is summed by two threads may differ in the last bit."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "keys").write_text(KEY)
    (folder / "keys").chmod(0o600)
    options = ["--ray", "--replicas", "2", "--cpus-per-replica", "0.5", "--max-sessions", str(SESSIONS)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short:
        patch.setenv("RAY_TMPDIR", short)  # sockets are in it, and their paths must be short
        patch.delenv("RAY_ADDRESS", raising=False)
        with process(folder, *options, "--api-key-file", str(folder / "keys")) as (child, port):
            everyone = descendants(child.pid)
            try:
                yield Fleet(child, port, folder / "log")
            finally:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)
                    child.wait(PATIENCE_S)
                wait_until(lambda: not any(map(is_alive, everyone)))


def test_openpi_client_through_the_ingress(fleet: Fleet) -> None:
    client = WebsocketClientPolicy("127.0.0.1", fleet.port, api_key=KEY)
    assert client.get_server_metadata()["robot"] == "libero"
    assert client.get_server_metadata()["replica"] in fleet.replicas()
    answer = client.infer({**observation(seed=3), "pi0_engine": {"seed": 5}})
    expected = policy().infer(observation(seed=3), noise=noise(np.random.default_rng(5)))
    np.testing.assert_array_equal(answer["actions"], expected["actions"])
    with pytest.raises(RuntimeError, match=r"bad_observation.*observation key 'observation/state' has shape \[3\]"):
        client.infer({**observation(), "observation/state": np.zeros(3)})
    broker = ActionChunkBroker(client, action_horizon=10)
    assert {broker.infer(observation())["session"]["sequence"] for _ in range(10)} == {2}


def test_refusals_come_through_the_ingress(fleet: Fleet) -> None:
    for headers in ({"Authorization": "Api-Key wrong"}, {"X-Nothing": "at all"}):
        with pytest.raises(websockets.exceptions.InvalidStatus) as caught, fleet.connect(**headers):
            pass
        assert caught.value.response.status_code == 401
    with contextlib.ExitStack() as stack:
        with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
            for _ in range(2 * SESSIONS + 1):
                stack.enter_context(fleet.connect()).recv(PATIENCE_S)
        assert caught.value.response.status_code == 503
        assert b"no room for another session" in caught.value.response.body


def test_probes_and_the_metrics_of_all_replicas(fleet: Fleet) -> None:
    assert fleet.http("/healthz") == (200, "OK\n") and fleet.http("/readyz") == (200, "ready\n")
    assert fleet.http("/metrics")[0] == 401
    status, text = fleet.http("/metrics", **HEADERS)
    assert status == 200 and "pi0_replicas 2.0" in text
    assert len(fleet.replicas()) == 2
    assert fleet.http("/", **HEADERS)[0] == 426


def test_a_message_beyond_the_limit_closes_its_connection_alone(fleet: Fleet) -> None:
    with fleet.connect() as good:
        good.recv(PATIENCE_S)
        for size in (16_500_000, 17_500_000):  # the replica refuses the first, Ray's proxy the second
            with fleet.connect() as bad:
                bad.recv(PATIENCE_S)
                with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
                    bad.send(bytes(size))
                    bad.recv(PATIENCE_S)
            if size < 2**24:  # the proxy stops reading in the middle, and its last word may be lost
                assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        good.send(packb(observation()))
        assert unpackb(good.recv(PATIENCE_S))["actions"].shape == (10, 7)


@dataclass
class Robot:
    """A client that goes on whatever happens, and what happened to it."""

    number: int
    replicas: list[str] = field(default_factory=list)  # that it was connected to, in order
    losses: list[str] = field(default_factory=list)  # those that broke a connection
    in_flight: int = 0  # requests whose answer never came
    right: int = 0  # answers that were checked

    def run(self, fleet: Fleet, all_begun: threading.Barrier, killed: threading.Event) -> None:
        try:
            self.work(fleet, all_begun, killed)
        except BaseException:
            all_begun.abort()  # nobody needs to wait for this one
            raise

    def work(self, fleet: Fleet, all_begun: threading.Barrier, killed: threading.Event) -> None:
        after = 0
        while after < 15:
            try:
                with fleet.connect() as connection:
                    self.replicas.append(unpackb(connection.recv(PATIENCE_S))["replica"])
                    for answers in self.converse(connection):
                        if answers == 3 and not killed.is_set():
                            all_begun.wait(PATIENCE_S)
                        after += killed.is_set()
                        if after >= 15:
                            return
            except websockets.exceptions.ConnectionClosed:
                self.losses.append(self.replicas[-1])
            except websockets.exceptions.InvalidStatus as refused:  # the router has not heard of the death yet
                assert refused.response.status_code in (500, 503)
                time.sleep(0.1)

    def converse(self, connection: Any) -> Iterator[int]:
        """Ask without end; yields how many answers have come over this connection, all of them right."""
        seed = 100 * self.number + len(self.replicas)
        rng, session = np.random.default_rng(seed), None
        for k in range(10_000):
            given = observation(seed=1000 * self.number + k % 5)
            asked = {"request": self.right, "seed": seed} if k == 0 else {"request": self.right}
            connection.send(packb({**given, "pi0_engine": asked}))
            self.in_flight += 1
            expected = policy().infer(given, noise=noise(rng))
            reply = connection.recv(PATIENCE_S)
            assert isinstance(reply, bytes), reply
            self.in_flight -= 1
            answer = unpackb(reply)
            np.testing.assert_array_equal(answer["actions"], expected["actions"])
            assert answer["request"] == self.right and answer["session"]["sequence"] == k + 1
            session = session or answer["session"]["id"]
            assert answer["session"]["id"] == session
            self.right += 1
            yield k + 1


def test_a_killed_replica_costs_a_reconnection_and_no_answer_is_wrong(fleet: Fleet) -> None:
    before, workers = fleet.replicas(), fleet.workers()
    assert len(before) == len(workers) == 2
    robots = [Robot(number) for number in range(CLIENTS)]
    all_begun, killed = threading.Barrier(CLIENTS + 1), threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = []
        for robot in robots:  # one after the other, so that Ray gives each replica its half
            running.append(pool.submit(robot.run, fleet, all_begun, killed))
            wait_until(lambda robot=robot: bool(robot.replicas) or all_begun.broken)  # type: ignore[misc]
        with contextlib.suppress(threading.BrokenBarrierError):  # then one of the results below says why
            all_begun.wait(PATIENCE_S)  # everyone is in the middle of his requests
        connected = {robot.number: robot.replicas[-1] for robot in robots if robot.replicas}
        time.sleep(0.1)
        os.kill(workers[0], signal.SIGKILL)
        killed.set()
        for each in running:
            each.result(PATIENCE_S)
    assert set(connected.values()) == before  # Ray gave clients to both
    lost = {name for robot in robots for name in robot.losses}
    assert len(lost) == 1 and lost < before
    for robot in robots:
        hit = connected[robot.number] in lost
        assert len(robot.losses) == (1 if hit else 0) and robot.right >= 18, robot
        assert hit or robot.replicas == [connected[robot.number]], robot  # the others never noticed
    assert sum(robot.in_flight for robot in robots) >= 1  # it was killed in the middle of a request
    # Ray starts another, and it gets clients.
    wait_until(lambda: len(fleet.replicas()) == 2)
    assert set(fleet.workers()) > {workers[1]} and workers[0] not in fleet.workers()
    (new,) = fleet.replicas() - before
    wait_until(
        lambda: WebsocketClientPolicy("127.0.0.1", fleet.port, api_key=KEY).get_server_metadata()["replica"] == new
    )


def test_a_drain_answers_what_is_under_way_and_leaves_no_process(fleet: Fleet) -> None:
    everyone, refused = descendants(fleet.process.pid), False
    with fleet.connect() as connection:
        connection.recv(PATIENCE_S)
        with pytest.raises(websockets.exceptions.ConnectionClosedOK) as caught:
            for k in range(100_000):  # a robot that goes on asking
                connection.send(packb({**observation(), "pi0_engine": {"request": k}}))
                reply = connection.recv(PATIENCE_S)
                answer = json.loads(reply) if isinstance(reply, str) else unpackb(reply)
                assert answer["request"] == k
                if isinstance(reply, str):
                    assert answer["code"] == "shutting_down"
                    refused = True
                else:
                    assert not refused and answer["actions"].shape == (10, 7)
                if k == 3:
                    fleet.process.send_signal(signal.SIGTERM)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
    assert fleet.process.wait(PATIENCE_S) == 0
    wait_until(lambda: not any(map(is_alive, everyone)))
    assert "Traceback" not in fleet.log.read_text()


def test_what_cannot_be_a_fleet_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*arguments: str) -> str:
        assert main(["serve", "--robot", "libero", "--random-weights", "0", "--config", "pi0", *arguments]) == 2
        return capsys.readouterr().err

    assert "give --ray too" in error("--replicas", "2")
    assert "--record is given with --ray" in error("--ray", "--record", "folder")
    assert "no key is asked" in error("--ray", "--host", "0.0.0.0")
    assert "expected at most 16.777 with --ray" in error("--ray", "--max-message-mb", "20")
    assert "Ray gives each replica its GPU" in error("--ray", "--device", "cuda:1")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert "unset RAY_SERVE_ENABLE_HA_PROXY" in error("--ray")


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own
def test_the_builder_takes_the_command_s_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pi0_engine.serving.ray_app import app

    model = {"robot": "libero", "random_weights": 0, "config": "pi0"}
    for wrong, message in (
        ({}, "expected api_key_file"),
        ({"port": 8000}, "port is given: Ray decides it"),
        ({"allow_unauthenticated": True, "device": "gpu"}, "expected 'cpu' or 'cuda'"),
        ({"allow_unauthenticated": "false"}, "expected api_key_file"),
        ({"allow_unauthenticated": True, "max_wating": 5}, "Unrecognized options: --max-wating"),
        ({"allow_unauthenticated": True, "max_waiting": "many"}, "Error parsing --max-waiting"),
    ):
        with pytest.raises(ValueError, match=message):
            app({**model, **wrong})
    scaling = {"autoscale": [1, 3], "autoscaling": {"downscale_delay_s": 7}, "target_sessions": 2}
    built = app({**model, **scaling, "allow_unauthenticated": "true", "max_sessions": 5})
    config = built._bound_deployment._deployment_config
    assert config.max_ongoing_requests > 5
    assert config.autoscaling_config.max_replicas == 3 and config.autoscaling_config.downscale_delay_s == 7
    assert config.autoscaling_config.target_ongoing_requests == 2
    assert built._bound_deployment.ray_actor_options["num_cpus"] == 1
    # One and zero are numbers here, not flags.
    built = app({**model, "allow_unauthenticated": True, "max_waiting": 1, "seed": 0, "verbose": False, "record": None})
    (replica,) = built._bound_deployment.init_args
    assert (replica.service.max_waiting, replica.service.seed, replica.verbose) == (1, 0, False)


def descendants(pid: int) -> list[int]:
    """Of a process, with itself."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found.extend(child for child, parent in parents.items() if parent == each)
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    return bool(command_of(pid))  # a process that has ended and was not waited for has none


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)

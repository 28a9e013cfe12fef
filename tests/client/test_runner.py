"""The runner around real policies: in this process and behind a websocket, slow, refusing, killed and restarted."""

from __future__ import annotations

import http
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("websockets", reason="the client is part of the extra 'serve'")
pytest.importorskip("msgpack", reason="the client is part of the extra 'serve'")

from pi0_engine.client import Answer, ChunkRunner, PolicyClient, Request, Stopped
from pi0_engine.client.control import Step
from pi0_engine.client.schedule import Chunk
from pi0_engine.client.sources import LocalSource, RemoteSource
from pi0_engine.policy import Pi0Policy
from tests.support import serving
from tests.support.paths import ROOT
from tests.support.serving import one_thread
from tests.support.websocket_servers import METADATA, policy_server, reply

HZ = 50.0
TOY = {"state": np.arange(3.0)}


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A real source whose answers come when the test lets them."""

    def __init__(self, source: Any, *, open_: bool = True) -> None:
        self.source = source
        self.requests: list[Request] = []
        self.answers: list[Answer] = []
        self.gate = threading.Event()
        if open_:
            self.gate.set()

    def ready(self) -> None:
        self.source.ready()

    def chunk(self, request: Request) -> Answer:
        self.requests.append(request)
        answer: Answer = self.source.chunk(request)
        assert self.gate.wait(serving.PATIENCE_S)
        self.answers.append(answer)
        return answer


class Robot:
    """Steps a runner in the clock's time and keeps what it was sent."""

    def __init__(self, runner: ChunkRunner, clock: Clock, observe: Callable[[], Any]) -> None:
        self.runner, self.clock, self.observe = runner, clock, observe
        self.sent: list[Step] = []

    def steps(self, count: int = 1) -> list[Step]:
        for _ in range(count):
            self.clock.now += 1 / HZ
            self.runner.step(self.observe)
            assert self.runner.last_step is not None
            self.sent.append(self.runner.last_step)
        return self.sent[-count:]

    def until(self, happened: Callable[[], bool]) -> None:
        """Step, as fast as the policy's threads do their work, until something has happened."""
        give_up = time.monotonic() + serving.PATIENCE_S
        while not happened():
            assert time.monotonic() < give_up, f"it did not happen: {self.runner.statistics.to_dict()}"
            self.clock.now += 1e-4  # little passes, so that nothing gets too old meanwhile
            self.runner.step(self.observe)
            assert self.runner.last_step is not None
            self.sent.append(self.runner.last_step)
            time.sleep(1e-3)

    def check_every_action_was_executed_in_its_own_step(self) -> None:
        executed = [s for s in self.sent if s.source == "chunk"]
        assert executed
        for s in executed:
            assert s.chunk is not None and s.index is not None and s.tick == s.chunk.tick + s.index
            np.testing.assert_array_equal(s.action, s.chunk.actions[s.index])


def libero() -> dict[str, Any]:
    return serving.observation("libero")


def wait_for(happened: Callable[[], bool]) -> None:
    give_up = time.monotonic() + serving.PATIENCE_S
    while not happened():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(1e-3)


@pytest.fixture(autouse=True)
def on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the server's process
    with one_thread():
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


def accepted(runner: ChunkRunner, count: int) -> Callable[[], bool]:
    return lambda: runner.statistics.accepted >= count


class Recorded:
    """A real policy, with what it was given and what it gave."""

    def __init__(self, policy: Pi0Policy) -> None:
        self._policy = policy
        self.calls: list[tuple[dict[str, Any], NDArray[np.float32]]] = []
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1
        self._policy.reset()

    def infer(self, observation: Any, **options: Any) -> dict[str, Any]:
        answer = self._policy.infer(observation, **options)
        self.calls.append((options, answer["actions"]))
        return answer


def test_a_policy_in_process_continues_its_own_chunks(clock: Clock) -> None:
    policy = Recorded(serving.policy())
    gate = Gate(LocalSource(policy))
    with ChunkRunner(gate, control_hz=HZ, hold="last", replan_after=3, clock=clock) as runner:
        robot = Robot(runner, clock, libero)
        robot.steps()
        wait_for(accepted(runner, 1))
        robot.steps(4)  # the fourth is three steps behind the observation: the next inference begins
        wait_for(accepted(runner, 2))
        robot.steps(2)
    (first, actions), (second, continued) = policy.calls
    assert first["leftover"] is None
    np.testing.assert_array_equal(second["leftover"].actions, actions[3:])
    assert [(s.source, s.index) for s in robot.sent] == [
        ("waiting", None), ("chunk", 0), ("chunk", 1), ("chunk", 2), ("chunk", 3), ("chunk", 1), ("chunk", 2),
    ]  # fmt: skip
    sent = np.stack([s.action for s in robot.sent[1:] if s.action is not None])
    np.testing.assert_array_equal(sent, np.concatenate([actions[:4], continued[1:3]]))
    assert policy.resets == 1


def test_any_policy_without_real_time_chunking(clock: Clock) -> None:
    class Still:
        def reset(self) -> None: ...

        def infer(self, observation: Any) -> dict[str, Any]:
            return {"actions": np.ones((5, 2))}

    with ChunkRunner(Still(), control_hz=HZ, hold="last", rtc=False, clock=clock) as runner:
        robot = Robot(runner, clock, lambda: {})
        robot.until(lambda: runner.statistics.executed > 0)
        assert robot.sent[-1].action is not None and robot.sent[-1].action.tolist() == [1, 1]
    with pytest.raises(ValueError, match="expected a Pi0Policy, a PolicyClient or a ChunkSource"):
        ChunkRunner(object(), control_hz=HZ, hold="last")


def test_the_control_loop_goes_on_while_the_policy_computes(clock: Clock) -> None:
    gate = Gate(LocalSource(serving.policy()))
    observed: list[threading.Thread] = []

    def observe() -> dict[str, Any]:
        observed.append(threading.current_thread())
        return libero()

    with ChunkRunner(gate, control_hz=HZ, hold="last", clock=clock, watchdog_s=10) as runner:
        robot = Robot(runner, clock, observe)
        robot.steps()
        wait_for(accepted(runner, 1))
        robot.steps(1)
        gate.gate.clear()
        horizon = 10
        robot.steps(horizon + 2)
        sources = [s.source for s in robot.sent[1:]]
        assert sources == ["chunk"] * horizon + ["hold"] * 3
        last = robot.sent[horizon].action
        assert last is not None
        np.testing.assert_array_equal(robot.sent[-1].action, last)
        # Cameras are read in the robot's own thread, and only where an inference begins.
        wait_for(lambda: len(gate.requests) == 2)
        assert observed == [threading.current_thread()] * 2
        assert runner.statistics.held == 3
        gate.gate.set()
    robot.check_every_action_was_executed_in_its_own_step()


def test_a_reset_voids_the_chunk_on_its_way(clock: Clock) -> None:
    policy = Recorded(serving.policy())
    gate = Gate(LocalSource(policy), open_=False)
    with ChunkRunner(gate, control_hz=HZ, hold="last", clock=clock) as runner:
        robot = Robot(runner, clock, libero)
        robot.steps()
        wait_for(lambda: len(policy.calls) == 1)
        runner.reset()
        robot.steps()
        gate.gate.set()
        wait_for(lambda: runner.statistics.discarded == {"reset": 1})
        assert robot.steps()[0].source == "waiting"
        wait_for(accepted(runner, 1))
        step = robot.steps()[0]
        np.testing.assert_array_equal(step.action, policy.calls[1][1][0])
        assert policy.resets == 2 and runner.statistics.accepted == 1


def test_the_watchdog_stops_and_reset_begins_again(clock: Clock) -> None:
    gate = Gate(LocalSource(serving.policy()), open_=False)
    with ChunkRunner(gate, control_hz=HZ, watchdog_s=0.5, clock=clock, hold=np.zeros(7)) as runner:
        robot = Robot(runner, clock, libero)
        robot.steps(int(0.5 * HZ) + 3)
        assert runner.state == "stopped"
        assert robot.sent[-1].action is not None and not robot.sent[-1].action.any()
        gate.gate.set()
        wait_for(lambda: runner.statistics.discarded == {"stopped": 1})
        assert robot.steps(5)[-1].source == "stopped" and len(gate.requests) == 1
        runner.reset()
        robot.until(lambda: runner.statistics.executed > 0)
        assert runner.state == "running"


def test_run_is_the_loop_and_raises_when_the_watchdog_stops() -> None:
    """In real time, of which nothing is asked but that it passes."""
    sent: list[NDArray[np.float32]] = []
    gate = Gate(LocalSource(serving.policy()))
    stop = threading.Event()

    def act(action: NDArray[np.float32]) -> None:
        sent.append(action)
        if len(sent) >= 5:
            stop.set()

    with ChunkRunner(gate, control_hz=200.0, hold="last", watchdog_s=60.0) as runner:
        runner.run(libero, act, stop=stop)
        assert len(sent) == 5 and all(action.shape == (7,) for action in sent)
        runner.run(libero, act, seconds=0.0)
        assert len(sent) == 5
    with pytest.raises(RuntimeError, match="the runner is closed"):
        runner.step(libero)

    gate.gate.clear()
    with (
        ChunkRunner(gate, control_hz=200.0, hold="last", watchdog_s=0.05) as runner,
        pytest.raises(Stopped, match="no new chunk"),
    ):
        try:
            runner.run(libero, act)
        finally:
            gate.gate.set()


class Waiting(threading.Event):
    """Waits in the clock's time, and keeps how long."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.waited = clock, list[float]()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waited.append(timeout)
        self.clock.now += timeout
        return self.is_set()


@pytest.mark.parametrize("stalled", ["act", "observe"])
def test_a_loop_that_was_stalled_does_not_catch_up(stalled: str, clock: Clock) -> None:
    """Two commands within one period would be a jump: after a stall the next comes a whole period later."""
    acted: list[float] = []
    calls = {"act": 0, "observe": 0}
    stop = Waiting(clock)

    def stall(name: str) -> None:
        calls[name] += 1
        if name == stalled and calls[name] == 2:
            clock.now += 5.5 / HZ

    def observe() -> Any:
        stall("observe")
        return libero()

    def act(action: NDArray[np.float32]) -> None:
        acted.append(clock.now)
        stall("act")
        wait_for(lambda: len(gate.answers) == runner.statistics.requests)  # so that the next step takes an observation

    gate = Gate(LocalSource(serving.policy()))
    runner = ChunkRunner(gate, control_hz=HZ, hold="last", watchdog_s=60.0, clock=clock)
    with runner:
        runner.step(libero)
        wait_for(lambda: len(gate.answers) == 1)
        runner.run(observe, act, seconds=2.0, stop=stop)
    assert len(acted) > 50
    apart = np.diff(acted)
    assert apart.min() >= 1 / HZ - 1e-9, f"two commands {1e3 * apart.min():.1f} ms apart"
    assert apart.max() >= 5.5 / HZ - 1e-9
    assert min(stop.waited) >= 0


def test_an_observation_that_is_refused_is_counted_and_the_next_one_is_tried(clock: Clock) -> None:
    with (
        serving.serving() as server,
        PolicyClient(f"ws://127.0.0.1:{server.port}", reply_timeout_s=serving.PATIENCE_S) as client,
        ChunkRunner(client, control_hz=HZ, hold="last", watchdog_s=60, clock=clock) as runner,
    ):
        robot = Robot(runner, clock, lambda: {**libero(), "observation/state": np.zeros(3)})
        robot.until(lambda: runner.statistics.errors["bad_observation"] >= 2)
        assert "observation/state" in str(runner.last_error) and {s.source for s in robot.sent} == {"waiting"}
        robot.observe = libero
        robot.until(accepted(runner, 2))
        robot.check_every_action_was_executed_in_its_own_step()
        assert runner.statistics.errors.keys() == {"bad_observation"}


class Replies(PolicyClient):
    """A client that keeps what it was answered."""

    def infer(self, observation: Any, **options: Any) -> dict[str, Any]:
        answer = super().infer(observation, **options)
        self.replies.append((options, answer))
        return answer

    @property
    def replies(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return self.__dict__.setdefault("_replies", [])


def test_chunks_continue_each_other_over_the_wire(clock: Clock) -> None:
    with (
        serving.serving() as server,
        Replies(f"ws://127.0.0.1:{server.port}", reply_timeout_s=serving.PATIENCE_S) as client,
        ChunkRunner(client, control_hz=HZ, hold="last", replan_after=3, watchdog_s=60, clock=clock) as runner,
    ):
        robot = Robot(runner, clock, libero)
        for count in (1, 2, 3):
            robot.until(accepted(runner, count))
        runner.reset()
        robot.until(accepted(runner, 4))
        robot.check_every_action_was_executed_in_its_own_step()
        (first, first_reply), (second, second_reply), *_ = client.replies
        assert first["rtc"] is None and "rtc" not in first_reply
        assert second["rtc"]["executed"] == 3 and second["rtc"]["sequence"] == first_reply["session"]["sequence"]
        assert second_reply["rtc"]["used"] and second_reply["rtc"]["leftover"] == 10 - 3
        after = next(options for options, answer in client.replies if answer["session"]["epoch"] > 1)
        assert after["rtc"] is None, "the new episode continues the old one"


def test_a_server_that_pauses_and_answers_late_moves_nothing(clock: Clock) -> None:
    """The late chunk's actions were for control steps that are gone."""
    paused, resume = threading.Event(), threading.Event()

    def answer(request: dict[str, Any], _: Any) -> Any:
        if paused.is_set() and "state" in request:
            assert resume.wait(serving.PATIENCE_S)
            request["state"] = np.full(3, 666.0)  # to be recognised
            paused.clear()
        return reply(request)

    with (
        policy_server(answer) as server,
        PolicyClient(server.uri, reply_timeout_s=serving.PATIENCE_S) as client,
        ChunkRunner(client, control_hz=HZ, hold="last", max_chunk_age_s=60.0, watchdog_s=60.0, clock=clock) as runner,
    ):
        robot = Robot(runner, clock, lambda: TOY)
        robot.until(accepted(runner, 1))
        paused.set()
        robot.steps(30)
        assert robot.sent[-1].source == "hold"
        resume.set()
        wait_for(lambda: runner.statistics.discarded["past"] == 1)
        robot.until(accepted(runner, runner.statistics.accepted + 1))
        robot.steps(2)
    assert all(s.action is None or s.action.max() < 600 for s in robot.sent)
    robot.check_every_action_was_executed_in_its_own_step()


@pytest.fixture
def port() -> Iterator[int]:
    """One that is free now, for a server that comes back to it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        number = listening.getsockname()[1]
    yield number


def test_a_server_that_is_killed_and_restarted(clock: Clock, tmp_path: Path, port: int) -> None:
    with serving.process(tmp_path, port=port) as (child, _):
        client = Replies(f"ws://127.0.0.1:{port}", reply_timeout_s=serving.PATIENCE_S, reconnect_s=serving.PATIENCE_S)
        runner = ChunkRunner(client, control_hz=HZ, hold="last", watchdog_s=600.0, clock=clock)
        robot = Robot(runner, clock, libero)
        robot.until(accepted(runner, 2))
        child.kill()
        child.wait()
        robot.until(lambda: runner.statistics.errors["connection_lost"] > 0)
        robot.steps(30)
        assert robot.sent[-1].source == "hold"  # the loop outlives the server, and the chunk too
        before, session = runner.statistics.accepted, client.session
    with serving.process(tmp_path, port=port), client, runner:
        wait_for(lambda: client.session != session)
        robot.until(accepted(runner, before + 2))
        robot.steps(3)
        renewed = [o for o, answer in client.replies if answer["session"]["id"] == client.session]
        assert renewed[0]["rtc"] is None, "it continues a chunk that the new server never made"
    robot.check_every_action_was_executed_in_its_own_step()
    assert runner.statistics.errors.keys() == {"connection_lost"}


def test_a_server_is_told_how_old_the_observation_is_and_when_it_will_be_useless(clock: Clock) -> None:
    with policy_server(metadata=METADATA) as server, PolicyClient(server.uri) as client:
        source = RemoteSource(client, clock=clock)
        clock.now = 10.0
        request = Request(TOY, 0, 9.9, 0, False, None, 0, 0, max_age_s=0.5)
        answer = source.chunk(request)
        assert np.shape(answer.actions) == (10, 3) and answer.name is None
        (asked,) = [r["pi0_engine"] for r in server.requests]
        assert asked["age_ms"] == pytest.approx(100) and asked["deadline_ms"] == pytest.approx(400)


def test_an_observation_does_not_wait_for_a_connection(clock: Clock) -> None:
    """One that broke between two requests is mended before the next observation is taken."""
    with (
        policy_server() as server,
        PolicyClient(server.uri, reply_timeout_s=serving.PATIENCE_S, reconnect_s=serving.PATIENCE_S) as client,
        ChunkRunner(client, control_hz=HZ, hold="last", replan_after=5, watchdog_s=60.0, clock=clock) as runner,
    ):
        robot = Robot(runner, clock, lambda: TOY)
        robot.until(accepted(runner, 1))
        server.refuse = http.HTTPStatus.SERVICE_UNAVAILABLE
        server.connections[0].close()
        wait_for(lambda: not client.connected)
        robot.until(lambda: runner.statistics.errors == {"connection_lost": 1})
        sent = len(server.requests)
        robot.steps(20)
        robot.observe = lambda: {"state": np.full(3, 7.0)}
        server.refuse = None
        robot.until(accepted(runner, 2))
        assert [request["state"].tolist() for request in server.requests[sent:]] == [[7, 7, 7]]
        robot.check_every_action_was_executed_in_its_own_step()


@pytest.mark.parametrize(("session", "asked"), [("s1", {"executed": 4, "delay": 2, "sequence": 7}), ("s0", None)])
def test_only_a_chunk_of_this_session_is_continued(session: str, asked: Any, clock: Clock) -> None:
    """A server that came back does not know what it made before."""
    previous = Chunk(np.zeros((10, 3), np.float32), 0, 1.0, name=(session, 7))
    with policy_server() as server, PolicyClient(server.uri) as client:
        assert client.session == "s1"
        RemoteSource(client, clock=clock).chunk(Request(TOY, 4, 0.0, 0, False, previous, 4, 2, None))
        RemoteSource(client, clock=clock, rtc=False).chunk(Request(TOY, 4, 0.0, 0, False, previous, 4, 2, None))
        assert [r["pi0_engine"].get("rtc") for r in server.requests] == [asked, None]


def test_the_example_of_the_documentation_moves_a_robot() -> None:
    text = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]

    class Arm:
        sent: ClassVar[list[NDArray[np.float32]]] = []

        def in_episode(self) -> bool:
            return len(self.sent) < 20

        def observe(self) -> dict[str, Any]:
            return libero()

        def send(self, action: NDArray[np.float32]) -> None:
            self.sent.append(action)

        def wait_for_next_period(self) -> None:
            time.sleep(0.005)

    with serving.serving() as server:
        assert "ws://127.0.0.1:8000" in example
        code = compile(example.replace(":8000", f":{server.port}"), "client.md", "exec")
        names: dict[str, Any] = {"robot": Arm(), "KEY": None}
        exec(code, names)
    assert np.shape(Arm.sent) == (20, 7) and names["runner"].statistics.executed > 0


def test_importing_the_client_loads_neither_torch_nor_anything_optional() -> None:
    """A robot's computer is small."""
    script = "import sys, pi0_engine.client; print({'torch', 'websockets', 'msgpack'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip() == "set()"

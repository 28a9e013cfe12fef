"""The server as clients see it: openpi's own client, and clients that pipeline, reset, set deadlines and misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client as websocket
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from pi0_engine.inputs import NotFiniteError
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.guards import Guards
from pi0_engine.rtc.schedule import Leftover
from pi0_engine.serving.access import Keys
from pi0_engine.serving.background import BackgroundServer
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service, ServiceOptions
from pi0_engine.serving.wire import packb, unpackb
from tests.support.clients import Gated, ask, connect, greeting, http, reply
from tests.support.serving import PATIENCE_S, certificate, fresh_policy, noise, observation, policy, serving


@pytest.fixture(scope="module")
def server() -> Any:
    with serving() as running:
        yield running


@pytest.mark.parametrize("robot", ["aloha", "droid", "libero"])
def test_openpi_client_gets_what_the_policy_computes(robot: str) -> None:
    given = observation(robot, seed=3)
    if robot == "aloha":  # nested, as ALOHA's own client sends it
        cameras = {key.removeprefix("images/"): given.pop(key) for key in [k for k in given if k.startswith("images/")]}
        given["images"] = cameras
    if robot == "droid":
        given["observation/gripper_position"] = given["observation/gripper_position"][0]
    with serving(
        lambda: policy(robot), service=ServiceOptions(seed=11, metadata={"reset_pose": [0.0, 1.0]})
    ) as running:
        client = WebsocketClientPolicy("127.0.0.1", running.port)
        greeting = client.get_server_metadata()
        assert greeting["robot"] == robot and greeting["reset_pose"] == [0.0, 1.0] and greeting["protocol"] == 1
        rng = np.random.default_rng((11, 0))
        for _ in range(2):  # the session's noise goes on
            answer = client.infer(given)
            expected = policy(robot).infer(given, noise=noise(rng))
            np.testing.assert_array_equal(answer["actions"], expected["actions"])
            assert answer["actions"].dtype == np.float32
            assert answer["policy_timing"]["infer_ms"] > 0 and answer["server_timing"]["infer_ms"] > 0
        assert answer["server_timing"]["prev_total_ms"] > 0


def test_openpi_broker_takes_a_chunk_apart(server: BackgroundServer) -> None:
    """It slices every array of a reply by the step: ``actions`` must be the only one."""
    broker = ActionChunkBroker(WebsocketClientPolicy("127.0.0.1", server.port), action_horizon=10)
    steps = [broker.infer(observation()) for _ in range(10)]
    assert {step["session"]["sequence"] for step in steps} == {1}
    assert all(step["actions"].shape == (7,) for step in steps)
    assert not np.array_equal(steps[0]["actions"], steps[9]["actions"])


def test_a_thousand_inferences_over_eight_connections(server: BackgroundServer) -> None:
    """Everyone gets the answer to his own observation, from his own noise."""

    def session(number: int) -> int:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        rng, name, right = np.random.default_rng(number), "", 0
        for k in range(125):
            given = observation(seed=1000 * number + k % 5)
            asked = {"request": k, "seed": number} if k == 0 else {"request": k}
            answer = client.infer({**given, "pi0_engine": asked})
            expected = policy().infer(given, noise=noise(rng))
            np.testing.assert_array_equal(answer["actions"], expected["actions"])
            assert answer["request"] == k and answer["session"]["sequence"] == k + 1
            assert answer["session"]["id"] == (name or answer["session"]["id"])
            name, right = answer["session"]["id"], right + 1
        return right

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(session, range(8))) == 1000


def test_errors_reach_openpi_client_and_the_connection_stays_usable(server: BackgroundServer) -> None:
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    with pytest.raises(RuntimeError, match=r"bad_observation.*observation key 'observation/state' has shape \[3\]"):
        client.infer({**observation(), "observation/state": np.zeros(3)})
    assert client.infer(observation())["actions"].shape == (10, 7)


def test_the_latest_observation_wins() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        gated.wait_until_entered()  # the warm-up's
        gated.gate.clear()
        connection.send(packb({**observation(), "pi0_engine": {"request": 0, "seed": 0}}))
        gated.wait_until_entered()
        for k in range(1, 7):
            connection.send(packb({**observation(seed=k), "pi0_engine": {"request": k, "seed": k}}))
        overtaken = [reply(connection) for _ in range(5)]
        assert [each["code"] for each in overtaken] == ["superseded"] * 5
        assert [each["request"] for each in overtaken] == [1, 2, 3, 4, 5]
        gated.gate.set()
        for k in (0, 6):
            answer = reply(connection)
            assert answer["request"] == k
            expected = policy().infer(observation(seed=k), noise=noise(np.random.default_rng(k)))
            np.testing.assert_array_equal(answer["actions"], expected["actions"])


def test_a_full_queue_answers_at_once() -> None:
    gated = Gated.make()
    with serving(lambda: gated, service=ServiceOptions(max_waiting=1)) as running, contextlib.ExitStack() as stack:
        a, b, c = (stack.enter_context(connect(running.port)) for _ in range(3))
        gated.wait_until_entered()
        gated.gate.clear()
        a.send(packb(observation()))
        gated.wait_until_entered()
        b.send(packb(observation()))
        while "pi0_waiting 1.0" not in http(running.port, "/metrics")[1]:
            pass
        assert ask(c, **observation())["code"] == "queue_full"
        gated.gate.set()
        assert reply(a)["actions"].shape == reply(b)["actions"].shape == (10, 7)


def test_a_refused_request_resets_nothing() -> None:
    gated = Gated.make()
    with serving(lambda: gated, service=ServiceOptions(max_waiting=1)) as running, contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(connect(running.port)) for _ in range(2))
        gated.wait_until_entered()
        gated.gate.clear()
        a.send(packb({**observation(), "pi0_engine": {"request": "running", "seed": 1}}))
        gated.wait_until_entered()
        b.send(packb(observation()))
        while "pi0_waiting 1.0" not in http(running.port, "/metrics")[1]:
            pass
        refused = ask(a, **observation(), pi0_engine={"request": "reset", "reset": True, "seed": 2})
        assert (refused["code"], refused["request"]) == ("queue_full", "reset")
        gated.gate.set()
        answer = reply(a)
        assert answer["request"] == "running" and answer["session"]["epoch"] == 0
        rng = np.random.default_rng(1)
        noise(rng)
        expected = policy().infer(observation(), noise=noise(rng))  # the noise goes on where it was
        np.testing.assert_array_equal(ask(a, **observation())["actions"], expected["actions"])


def test_deadlines_are_met_missed_or_too_late_to_begin() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection, connect(running.port) as other:
        gated.wait_until_entered()
        answer = ask(connection, **observation(), pi0_engine={"deadline_ms": 60_000})
        assert answer["deadline"]["met"] and 0 < answer["deadline"]["used_ms"] < answer["deadline"]["budget_ms"]
        gated.wait_until_entered()
        gated.gate.clear()
        connection.send(packb({**observation(), "pi0_engine": {"deadline_ms": 40}}))
        gated.wait_until_entered()
        other.send(packb({**observation(), "pi0_engine": {"deadline_ms": 1, "request": "late"}}))
        while "pi0_waiting 1.0" not in http(running.port, "/metrics")[1]:
            pass
        threading.Event().wait(0.1)  # past both deadlines
        gated.gate.set()
        answer = reply(connection)
        assert not answer["deadline"]["met"] and answer["deadline"]["used_ms"] > 40
        refused = reply(other)
        assert refused["code"] == "deadline_missed" and refused["request"] == "late"
        text = http(running.port, "/metrics")[1]
        assert 'pi0_deadlines_total{outcome="met"} 1.0' in text and 'outcome="missed"} 2.0' in text
        assert 'pi0_rejected_total{code="deadline_missed"} 1.0' in text


def test_a_reset_begins_anew_and_drops_what_was_under_way() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        gated.wait_until_entered()
        gated.gate.clear()
        connection.send(packb({**observation(), "pi0_engine": {"request": "running"}}))
        gated.wait_until_entered()
        connection.send(packb({**observation(), "pi0_engine": {"request": "waiting"}}))
        connection.send(packb({"pi0_engine": {"reset": True, "request": "reset"}}))
        first, second = reply(connection), reply(connection)
        by_request = {each["request"]: each for each in (first, second)}
        assert by_request["waiting"]["code"] == "superseded"
        assert by_request["reset"]["reset"] and by_request["reset"]["session"]["epoch"] == 1
        gated.gate.set()
        assert reply(connection) == {
            "code": "superseded",
            "message": "the session was reset meanwhile",
            "request": "running",
        }
        assert ask(connection, **observation())["session"]["epoch"] == 1
        answer = ask(connection, **observation(), pi0_engine={"reset": True, "seed": 4})
        assert answer["session"]["epoch"] == 2
        expected = policy().infer(observation(), noise=noise(np.random.default_rng(4)))
        np.testing.assert_array_equal(answer["actions"], expected["actions"])


def test_a_chunk_continues_the_one_in_execution(server: BackgroundServer) -> None:
    assert greeting(server.port)["rtc"]["mode"] == "guided"
    with connect(server.port) as connection, connect(server.port) as other:

        def next_chunk(seed: int, **rtc: int) -> Any:
            return ask(connection, **observation(seed=seed), pi0_engine={"seed": seed, "rtc": rtc})

        first = next_chunk(1, executed=0, delay=0)
        assert first["rtc"] == {"used": False, "delay": 0, "leftover": 0, "reason": "the episode has no chunk yet"}
        second = next_chunk(2, executed=4, delay=2)
        assert second["rtc"] == {"used": True, "delay": 2, "leftover": 6}
        leftover = Leftover(first["actions"][4:], 2)
        expected = policy().infer(observation(seed=2), noise=noise(np.random.default_rng(2)), leftover=leftover)
        np.testing.assert_array_equal(second["actions"], expected["actions"])
        third = next_chunk(
            3, executed=6, delay=1, sequence=1
        )  # the second reply came too late: the robot kept to the first
        expected = policy().infer(
            observation(seed=3), noise=noise(np.random.default_rng(3)), leftover=Leftover(first["actions"][6:], 1)
        )
        np.testing.assert_array_equal(third["actions"], expected["actions"])
        assert "all 10 actions of chunk 3" in next_chunk(4, executed=10, delay=0)["rtc"]["reason"]
        assert "chunk 99 is not among [1, 2, 3, 4]" in next_chunk(5, executed=1, delay=0, sequence=99)["rtc"]["reason"]
        assert "rtc" not in ask(connection, **observation())
        assert next_chunk(6, executed=1)["code"] == "bad_request"  # LIBERO declares no control rate to count in
        assert ask(connection, pi0_engine={"reset": True})["reset"]
        assert next_chunk(7, executed=0, delay=0)["rtc"]["reason"] == "the episode has no chunk yet"
        # Nobody continues a chunk of another session.
        answer = ask(other, **observation(), pi0_engine={"rtc": {"executed": 0, "delay": 0}})
        assert answer["rtc"]["reason"] == "the episode has no chunk yet"


def test_a_solver_that_cannot_be_guided_refuses_to_continue() -> None:
    """With the first message that asks: no robot learns it with a chunk in execution. Others are answered."""
    second_order = fresh_policy(solver="adams_bashforth")
    with serving(lambda: second_order) as running, connect(running.port) as connection:
        assert greeting(running.port)["rtc"] is None
        refused = ask(connection, **observation(), pi0_engine={"rtc": {"executed": 0, "delay": 0}})
        assert refused["code"] == "bad_request" and "the solver is 'adams_bashforth'" in refused["message"]
        answer = ask(connection, **observation(), pi0_engine={"seed": 2})
        expected = second_order.infer(observation(), noise=noise(np.random.default_rng(2)))
        np.testing.assert_array_equal(answer["actions"], expected["actions"])


def test_without_a_delay_the_latency_of_the_session_counts() -> None:
    gated, control_hz = Gated.make(), 1000.0
    robot = dataclasses.replace(gated.transform.robot, control_hz=control_hz)
    gated.transform = dataclasses.replace(gated.transform, robot=robot)
    with serving(lambda: gated) as running, connect(running.port) as connection:
        for _ in range(3):
            answer = ask(connection, **observation(), pi0_engine={"rtc": {"executed": 1}})
        assert answer["rtc"]["used"] and 1 <= answer["rtc"]["delay"] <= 9  # milliseconds, and what is left of the chunk


def test_without_a_rate_the_client_must_say_the_delay() -> None:
    gated = Gated.make()
    robot = dataclasses.replace(gated.transform.robot, control_hz=None)
    object.__setattr__(gated.transform, "robot", robot)
    with serving(lambda: gated) as running, connect(running.port) as connection:
        ask(connection, **observation())
        refused = ask(connection, **observation(), pi0_engine={"rtc": {"executed": 1}})
        assert refused["code"] == "bad_request"
        assert "pi0_engine.rtc.delay is missing, and robot 'libero' declares no control_hz" in refused["message"]
        assert ask(connection, **observation(), pi0_engine={"rtc": {"executed": 1, "delay": 2}})["rtc"]["used"]


def test_guards_act_on_the_whole_chunk_and_say_so() -> None:
    limits = tuple((-0.2, 0.2) for _ in range(7))

    def guarded(on_violation: Any) -> Pi0Policy:
        made = fresh_policy()
        robot = dataclasses.replace(made.transform.robot, guards=Guards(on_violation=on_violation, limits=limits))
        made.transform = dataclasses.replace(made.transform, robot=robot)
        return made

    free = policy().infer(observation(), noise=noise(np.random.default_rng(0)))["actions"]
    assert np.abs(free).max() > 0.2
    with serving(lambda: guarded("clip")) as running, connect(running.port) as connection:
        answer = ask(connection, **observation(), pi0_engine={"seed": 0})
        np.testing.assert_array_equal(answer["actions"], np.clip(free, np.float32(-0.2), np.float32(0.2)))
        assert answer["guards"]["applied"] == "clip" and answer["guards"]["count"] == (np.abs(free) > 0.2).sum()
        assert 'pi0_guarded_total{applied="clip"} 1.0' in http(running.port, "/metrics")[1]
    with serving(lambda: guarded("refuse")) as running, connect(running.port) as connection:
        refused = ask(connection, **observation(), pi0_engine={"seed": 0, "request": 1})
        assert refused["code"] == "guard_violation" and refused["request"] == 1 and "limit 0.2" in refused["message"]


def test_an_observation_that_is_too_old_is_refused() -> None:
    made = fresh_policy()
    robot = dataclasses.replace(made.transform.robot, guards=Guards(max_observation_age_ms=10_000))
    made.transform = dataclasses.replace(made.transform, robot=robot)
    with serving(lambda: made) as running, connect(running.port) as connection:
        assert "actions" in ask(connection, **observation(), pi0_engine={"age_ms": 5})
        assert ask(connection, **observation(), pi0_engine={"age_ms": 10_001})["code"] == "stale_observation"


def test_a_failed_inference_says_so_without_a_traceback_and_leaves_nothing_behind() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        expected = policy().infer(observation(), noise=noise(np.random.default_rng(0)))["actions"]
        for _ in range(3):
            gated.failures.append(ZeroDivisionError("a detail that is nobody's business"))
            answer = ask(connection, **observation(), pi0_engine={"seed": 0})
            assert answer == {"code": "inference_failed", "message": "an error inside the server; its log says more"}
            answer = ask(connection, **observation(), pi0_engine={"seed": 0})
            np.testing.assert_array_equal(answer["actions"], expected)
        assert http(running.port, "/readyz")[0] == 200


def test_nan_is_never_sent() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        gated.failures.append(NotFiniteError("the model computed NaN"))
        assert ask(connection, **observation())["code"] == "not_finite"
        poisoned, finish = gated.transform, gated.transform.finish
        object.__setattr__(poisoned, "finish", lambda actions, context: finish(actions, context) * np.nan)
        assert ask(connection, **observation())["code"] == "not_finite"
        object.__delattr__(poisoned, "finish")
        assert np.isfinite(ask(connection, **observation())["actions"]).all()


def test_a_policy_that_cannot_answer_any_more_ends_the_server() -> None:
    """So that a supervisor starts another, instead of every robot being refused for ever."""
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        gated.failures.extend([RuntimeError("the GPU is lost")] * 2)
        assert ask(connection, **observation())["code"] == "inference_failed"
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            connection.recv(PATIENCE_S)
        with pytest.raises(RuntimeError, match="inference does not work any more: the GPU is lost"):
            running.ended.result(PATIENCE_S)


def test_a_policy_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Pi0Policy:
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"), serving(load):
        pass


def test_alive_from_the_start_ready_after_the_warm_up() -> None:
    gated = Gated.make()
    gated.gate.clear()
    running = serving(lambda: gated)
    gated.wait_until_entered()  # the warm-up's inference
    port = running.port_while_loading
    assert http(port, "/healthz") == (200, "OK\n")
    assert http(port, "/readyz") == (503, "not ready\n")
    with websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as early:  # waits for the greeting
        with pytest.raises(TimeoutError):
            early.recv(0.05)
        gated.gate.set()
        assert unpackb(early.recv(PATIENCE_S))["robot"] == "libero"
    assert running.port == port and http(port, "/readyz") == (200, "ready\n")
    running.stop()
    running.ended.result(PATIENCE_S)


def test_a_server_can_be_stopped_while_it_loads() -> None:
    gated = Gated.make()
    gated.gate.clear()
    running = serving(lambda: gated, drain_s=0.1)
    gated.wait_until_entered()
    with websocket.connect(f"ws://127.0.0.1:{running.port_while_loading}", compression=None) as early:
        running.stop()
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            early.recv(PATIENCE_S)
    running.ended.result(PATIENCE_S)
    assert not running.address.done()
    gated.gate.set()


def test_metrics_count_what_happened(server: BackgroundServer) -> None:
    with connect(server.port) as connection:
        before = http(server.port, "/metrics")[1]
        assert ask(connection)["code"] == "bad_observation"
        assert "actions" in ask(connection, **observation())
        after = http(server.port, "/metrics")[1]

    def value(text: str, name: str) -> float:
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))

    for name in ("pi0_request_seconds_count", "pi0_queue_seconds_count", 'pi0_rejected_total{code="bad_observation"}'):
        assert value(after, name) == value(before, name) + 1
    assert value(after, "pi0_sessions") >= 1


def test_keys_are_asked_for_before_anything_is_said() -> None:
    with serving(keys=Keys((b"right",))) as running:
        client = WebsocketClientPolicy("127.0.0.1", running.port, api_key="right")
        assert client.infer(observation())["actions"].shape == (10, 7)
        for wrong in ("wrong", None):
            with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
                WebsocketClientPolicy("127.0.0.1", running.port, api_key=wrong)
            assert caught.value.response.status_code == 401
        assert http(running.port, "/healthz")[0] == 200  # a supervisor has no key
        assert http(running.port, "/metrics")[0] == 401
        status, text = http(running.port, "/metrics", Authorization="Api-Key right")
        assert status == 200 and 'pi0_rejected_total{code="unauthorized"} 3.0' in text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: it makes the certificate")
def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "-nodes")
    with serving(tls_cert=cert, tls_key=key) as running:
        assert running.address.result().startswith("wss://")
        trusted = ssl.create_default_context(cafile=cert)
        with websocket.connect(f"wss://127.0.0.1:{running.port}", ssl=trusted, compression=None) as connection:
            assert unpackb(connection.recv(PATIENCE_S))["robot"] == "libero"
            assert "actions" in ask(connection, **observation())
        plain = pytest.raises((websockets.exceptions.InvalidMessage, OSError, EOFError))
        with plain, connect(running.port):
            pass
    with pytest.raises(ValueError, match="expected both --tls-cert and --tls-key"):
        ServerOptions(tls_cert=cert)
    with pytest.raises(ValueError, match="cannot use"):
        ServerOptions(tls_cert=key, tls_key=cert).tls()


def test_sessions_beyond_the_limit_are_refused_and_room_is_made_again() -> None:
    with serving(service=ServiceOptions(max_sessions=2)) as running, connect(running.port) as stays:
        with connect(running.port) as leaves:
            assert "actions" in ask(leaves, **observation())
            with pytest.raises(websockets.exceptions.InvalidStatus) as caught, connect(running.port):
                pass
            assert caught.value.response.status_code == 503
        while "pi0_sessions 1.0" not in http(running.port, "/metrics")[1]:
            pass
        with connect(running.port) as comes:
            assert "actions" in ask(comes, **observation()) and "actions" in ask(stays, **observation())


def test_a_message_beyond_the_limit_closes_its_connection_alone(server: BackgroundServer) -> None:
    with serving(max_message_mb=0.1) as running, connect(running.port) as good:
        with connect(running.port) as bad:
            bad.send(bytes(200_000))
            with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
                bad.recv(PATIENCE_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        assert "actions" in ask(good, **observation())


def test_draining_answers_what_is_under_way_and_says_goodbye() -> None:
    gated = Gated.make()
    with serving(lambda: gated) as running, connect(running.port) as connection:
        port = running.port
        gated.wait_until_entered()
        gated.gate.clear()
        connection.send(packb(observation()))
        gated.wait_until_entered()
        running.stop()
        while running.service.is_ready:
            pass
        assert ask(connection, **observation())["code"] == "shutting_down"
        with pytest.raises(OSError), connect(port):
            pass
        gated.gate.set()
        assert reply(connection)["actions"].shape == (10, 7)
        with pytest.raises(websockets.exceptions.ConnectionClosedOK) as caught:
            connection.recv(PATIENCE_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
        running.ended.result(PATIENCE_S)


def test_a_drain_does_not_wait_for_ever() -> None:
    gated = Gated.make()
    with serving(lambda: gated, drain_s=0.1) as running:
        gated.wait_until_entered()
        with connect(running.port) as running_one, connect(running.port) as waiting_one:
            gated.gate.clear()
            running_one.send(packb(observation()))
            gated.wait_until_entered()
            waiting_one.send(packb(observation()))
            while "pi0_waiting 1.0" not in http(running.port, "/metrics")[1]:
                pass
            running.stop()
            assert reply(waiting_one)["code"] == "shutting_down"
            running.ended.result(PATIENCE_S)
        gated.gate.set()


def test_options_that_make_no_server() -> None:
    for options in ({"port": 70_000}, {"max_message_mb": 0}, {"drain_s": -1.0}, {"host": "0.0.0.0"}):
        with pytest.raises(ValueError, match=r"expected|--api-key-file"):
            ServerOptions(**options)
    with pytest.raises(ValueError, match="max_waiting is 0"):
        ServiceOptions(max_waiting=0)
    with serving() as running, pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1"):
        taken = BackgroundServer(Service(policy), ServerOptions(port=running.port))
        taken.ended.result(PATIENCE_S)

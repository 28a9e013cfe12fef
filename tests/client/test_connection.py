"""The websocket client against servers that refuse, break, come back, or are openpi's."""

from __future__ import annotations

import http
import json
import threading
import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("websockets", reason="the client is part of the extra 'serve'")
pytest.importorskip("msgpack", reason="the client is part of the extra 'serve'")

from pi0_engine.client import ConnectionLost, PolicyClient, PolicyError
from tests.support.websocket_servers import METADATA, policy_server, reply

OBSERVATION = {"state": np.arange(3.0), "prompt": "wave"}
#: For servers that are there: a hang is a failure.
QUICK: dict[str, Any] = {"reply_timeout_s": 10.0, "reconnect_s": 10.0}


def test_an_observation_goes_out_and_actions_come_back() -> None:
    with policy_server() as server, PolicyClient(server.uri, api_key="secret", **QUICK) as client:
        assert client.is_pi0_engine and client.session == "s1" and client.metadata["robot"] == "toy"
        answer = client.infer(
            OBSERVATION, deadline_ms=80, age_ms=5, rtc={"executed": 3, "delay": 2, "sequence": 1}, seed=4
        )
        np.testing.assert_array_equal(answer["actions"], np.repeat(np.arange(3.0)[None], 10, axis=0))
        client.infer(OBSERVATION)
        client.reset()
        assert server.headers[0]["Authorization"] == "Api-Key secret"
        asked = [request.pop("pi0_engine") for request in server.requests]
        assert asked == [
            {
                "request": 1,
                "deadline_ms": 80,
                "age_ms": 5,
                "rtc": {"executed": 3, "delay": 2, "sequence": 1},
                "seed": 4,
            },
            {"request": 2},
            {"request": 3, "reset": True},
        ]
        assert [sorted(request) for request in server.requests] == [["prompt", "state"]] * 2 + [[]]


def test_openpi_s_server_sees_openpi_s_keys_only() -> None:
    with policy_server(metadata={"reset_pose": [0.0, 1.0]}) as server, PolicyClient(server.uri, **QUICK) as client:
        assert not client.is_pi0_engine
        client.infer(OBSERVATION, deadline_ms=80, age_ms=5, rtc={"executed": 1, "delay": 1}, seed=4)
        client.reset()
        assert [sorted(request) for request in server.requests] == [["prompt", "state"]]
        server.answer = lambda request, _: "Traceback ...\nKeyError: 'image'\n"
        with pytest.raises(PolicyError, match="KeyError: 'image'") as caught:
            client.infer(OBSERVATION)
        assert caught.value.code == "server_error"


def test_an_error_has_its_code_and_leaves_the_connection_usable() -> None:
    refusal = json.dumps({"code": "bad_observation", "message": "state has 3 numbers, expected 8", "request": 1})
    with policy_server(lambda *_: refusal) as server, PolicyClient(server.uri, **QUICK) as client:
        with pytest.raises(PolicyError, match="state has 3 numbers") as caught:
            client.infer(OBSERVATION)
        assert caught.value.code == "bad_observation"
        server.answer = lambda request, _: reply(request)
        assert client.infer(OBSERVATION)["actions"].shape == (10, 3)
        assert len(server.headers) == 1


def test_a_request_on_a_broken_connection_fails_and_is_never_sent_again() -> None:
    with policy_server(lambda *_: None) as server, PolicyClient(server.uri, **QUICK) as client:
        with pytest.raises(ConnectionLost):
            client.infer(OBSERVATION)
        server.answer = lambda request, _: reply(request)
        client.infer({**OBSERVATION, "state": np.ones(3)})
        assert [request["state"].tolist() for request in server.requests] == [[0, 1, 2], [1, 1, 1]]
        assert client.session == "s2"
        # How long the second observation waited for the connection is part of its age.
        assert "age_ms" not in server.requests[0]["pi0_engine"] and server.requests[1]["pi0_engine"]["age_ms"] > 0


def test_a_connection_that_broke_between_requests_is_renewed_before_the_next() -> None:
    with policy_server() as server, PolicyClient(server.uri, **QUICK) as client:
        client.infer(OBSERVATION)
        server.connections[0].close()
        wait_until(lambda: not client.connected)
        client.reset()  # a new session needs none
        client.infer(OBSERVATION)
        assert client.session == "s2"
        assert all("reset" not in request["pi0_engine"] for request in server.requests)


def test_an_observation_grows_older_while_the_client_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds, as all of the wire's times are. A call that need not connect adds nothing."""
    with policy_server() as server, PolicyClient(server.uri, **QUICK) as client:
        connect = client._connect

        def slow() -> bool:
            time.sleep(0.2 if not client.connected else 0.0)
            return connect()

        client.infer(OBSERVATION)
        server.connections[0].close()
        wait_until(lambda: not client.connected)
        monkeypatch.setattr(client, "_connect", slow)
        started = time.monotonic()
        client.infer(OBSERVATION, age_ms=30.0)
        longest_ms = 1e3 * (time.monotonic() - started)
        client.infer(OBSERVATION, age_ms=30.0)
        first, second = (request["pi0_engine"]["age_ms"] for request in server.requests[1:])
    assert 230.0 <= first <= 30.0 + longest_ms
    assert second == 30.0


def test_a_server_that_is_killed_and_comes_back() -> None:
    with policy_server() as server, PolicyClient(server.uri, **QUICK) as client:
        client.infer(OBSERVATION)
        server.answer = lambda *_: server.stop()
        with pytest.raises(ConnectionLost):
            client.infer(OBSERVATION)
        server.answer = lambda request, _: reply(request)
        threading.Timer(0.3, server.start).start()
        assert client.infer(OBSERVATION)["actions"].shape == (10, 3)


def test_a_reply_that_comes_too_late_is_not_taken_for_the_next_one() -> None:
    paused = threading.Event()

    def late(request: dict[str, Any], _: Any) -> Any:
        if len(server.requests) == 1:
            paused.wait(20)
        return reply(request)

    with policy_server(late) as server, PolicyClient(server.uri, reply_timeout_s=0.2, reconnect_s=10.0) as client:
        with pytest.raises(ConnectionLost, match=r"no reply within 0\.2 s"):
            client.infer(OBSERVATION)
        paused.set()
        client._reply_timeout_s = 10.0
        answer = client.infer({**OBSERVATION, "state": np.full(3, 7.0)})
        assert (answer["actions"] == 7).all()


@pytest.mark.parametrize(
    "frame",
    [b"\xc1", {"request": 99, "actions": np.zeros((1, 3))}, b"\x93\x01\x02\x03"],
    ids=["not msgpack", "of another request", "not a map"],
)
def test_a_reply_that_cannot_be_one_ends_the_connection(frame: Any) -> None:
    with policy_server(lambda *_: frame) as server, PolicyClient(server.uri, **QUICK) as client:
        with pytest.raises(ConnectionLost):
            client.infer(OBSERVATION)
        server.answer = lambda request, _: reply(request)
        client.infer(OBSERVATION)
        assert len(server.headers) == 2


def test_a_reply_beyond_the_largest_size_ends_the_connection() -> None:
    with policy_server(lambda request, _: reply(request, 10_000)) as server:  # 120 kB
        with PolicyClient(server.uri, max_size=100_000, **QUICK) as client, pytest.raises(ConnectionLost):
            client.infer(OBSERVATION)
        with PolicyClient(server.uri, max_size=130_000, **QUICK) as client:
            client.infer(OBSERVATION)


def test_a_refused_key_is_final_and_a_busy_server_is_tried_again() -> None:
    with policy_server() as server:
        server.refuse = http.HTTPStatus.UNAUTHORIZED
        with pytest.raises(PolicyError, match="Unauthorized") as caught:
            PolicyClient(server.uri, **QUICK)
        assert caught.value.code == "unauthorized" and len(server.headers) == 1
        server.refuse = http.HTTPStatus.SERVICE_UNAVAILABLE
        with pytest.raises(ConnectionLost, match="503: Service Unavailable"):
            PolicyClient(server.uri, reconnect_s=0.0)
        threading.Timer(0.3, lambda: setattr(server, "refuse", None)).start()
        with PolicyClient(server.uri, **QUICK) as client:
            client.infer(OBSERVATION)
        assert len(server.headers) > 3


def test_another_robot_s_server_at_the_same_address_is_refused() -> None:
    with policy_server() as server, PolicyClient(server.uri, **QUICK) as client:
        server.metadata = {**METADATA, "robot": "crane"}
        server.connections[0].close()
        wait_until(lambda: not client.connected)
        with pytest.raises(PolicyError, match="came back with robot 'crane', it was 'toy'") as caught:
            client.infer(OBSERVATION)
        assert caught.value.code == "server_changed" and server.requests == []


def test_attempts_are_bounded_and_wait_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def wait(event: threading.Event, seconds: float | None = None) -> bool:
        waits.append(seconds or 0.0)
        clock[0] += seconds or 0.0
        return False

    clock = [0.0]
    with policy_server() as server:
        client = PolicyClient(server.uri, reconnect_s=60.0)
    wait_until(lambda: not client.connected)
    monkeypatch.setattr(threading.Event, "wait", wait)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(ConnectionLost, match="cannot connect"):
        client.connect()
    longest = [min(0.1 * 2**n, 5.0) for n in range(len(waits))]
    assert len(waits) >= 12 and 50.0 < sum(waits) <= 60.0
    assert all(0.5 * most <= waited <= most for waited, most in zip(waits, longest, strict=True))
    assert len({waited / most for waited, most in zip(waits, longest, strict=True)}) == len(waits)  # at random


def test_close_ends_a_request_that_waits_and_all_later_ones() -> None:
    gone = threading.Event()
    with policy_server(lambda *_: gone.wait(20)) as server:
        client = PolicyClient(server.uri, close_timeout_s=0.2, **QUICK)
        threading.Timer(0.2, client.close).start()
        with pytest.raises(ConnectionLost):
            client.infer(OBSERVATION)
        with pytest.raises(ConnectionLost, match="is closed"):
            client.infer(OBSERVATION)
        assert not gone.is_set()
        gone.set()


def test_what_cannot_be_sent_is_named_and_harms_nothing() -> None:
    with policy_server() as server, PolicyClient(server.uri, **QUICK) as client:
        with pytest.raises(ValueError, match="the key 'pi0_engine'"):
            client.infer({**OBSERVATION, "pi0_engine": {}})
        with pytest.raises(ValueError, match="cannot be sent"):
            client.infer({"state": object()})
        client.infer(OBSERVATION)
        assert len(server.headers) == 1


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "127.0.0.1:8000", "ws://"])
def test_a_uri_that_is_none(uri: str) -> None:
    with pytest.raises(ValueError, match="not a websocket URI"):
        PolicyClient(uri, reconnect_s=0.0)


def test_a_server_that_does_not_greet() -> None:
    with policy_server() as server:
        server.metadata = {"reset_pose": "x" * 100}
        with PolicyClient(server.uri, max_size=4096, **QUICK):
            pass
        with pytest.raises(ConnectionLost, match="does not greet as a policy server"):
            PolicyClient(server.uri, max_size=50, reconnect_s=0.0)


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)

"""Time and state of the server while its engine is busy, and two features at a time.

Idle, the queue's time is nothing, milliseconds and seconds of nothing are alike, and what one feature leaves for the
next is what it found.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0_engine.inputs import NotFiniteError
from pi0_engine.recording.files import Recording
from pi0_engine.recording.recorder import Recorder
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.guards import Guards
from pi0_engine.rtc.schedule import Leftover
from pi0_engine.serving.background import BackgroundServer
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service, ServiceOptions
from pi0_engine.serving.wire import packb
from tests.support.clients import Gated, ask, connect, http, reply
from tests.support.serving import PATIENCE_S, noise, observation, policy, serving

#: The engine is held up so long: seconds, far more than an idle server takes.
HELD_S = 0.5


def gated(**robot: Any) -> Gated:
    """A policy that can be held up, of a robot with some of its declaration changed."""
    made = Gated.make()
    changed: Robot = dataclasses.replace(made.transform.robot, **robot)
    made.transform = dataclasses.replace(made.transform, robot=changed)
    return made


@contextmanager
def busy(held: Gated, port: int) -> Iterator[None]:
    """The engine computes for somebody else: for ``HELD_S`` from when the server has received what is sent inside."""
    held.gate.clear()
    while held.entered.acquire(blocking=False):
        pass
    with connect(port) as other:
        other.send(packb(observation()))
        held.wait_until_entered()
        yield
        until = time.monotonic() + PATIENCE_S
        while "pi0_waiting 1.0" not in http(port, "/metrics")[1]:
            assert time.monotonic() < until, "nothing waits for the engine"
        time.sleep(HELD_S)
        held.gate.set()
        reply(other)


def test_the_time_in_the_queue_makes_an_observation_older() -> None:
    held = gated(guards=Guards(max_observation_age_ms=1e3 * HELD_S * 0.8))
    with serving(lambda: held) as running, connect(running.port) as connection:
        assert "actions" in ask(connection, **observation(), pi0_engine={"age_ms": 1.0})
        with busy(held, running.port):
            connection.send(packb({**observation(), "pi0_engine": {"age_ms": 1.0}}))
        refused = reply(connection)
        assert refused["code"] == "stale_observation", refused
        assert "actions" in ask(connection, **observation(), pi0_engine={"age_ms": 1.0})


def test_the_delay_of_a_session_counts_its_time_in_the_queue() -> None:
    held = gated(control_hz=10.0)
    with serving(lambda: held) as running, connect(running.port) as connection:
        ask(connection, **observation())  # the first latency is left out: it may be a warm-up
        with busy(held, running.port):
            connection.send(packb(observation()))
        assert "actions" in reply(connection)
        continued = ask(connection, **observation(), pi0_engine={"rtc": {"executed": 0}})
        assert continued["rtc"]["delay"] >= 10 * HELD_S, "the chunk is there after what the engine was held up for"


def test_metrics_are_in_seconds() -> None:
    held = gated()
    with serving(lambda: held) as running, connect(running.port) as connection:
        started = time.perf_counter()
        with busy(held, running.port):
            connection.send(packb(observation()))
        answer = reply(connection)
        longest = time.perf_counter() - started
        assert HELD_S <= 1e-3 * answer["server_timing"]["queue_ms"] <= longest
        text = http(running.port, "/metrics")[1]
    sums = {name: float(value) for name, value in re.findall(r"^pi0_(\w+)_seconds_sum (\S+)$", text, re.MULTILINE)}
    # Two requests: one was computed as long as the other waited.
    assert HELD_S <= sums["queue"] <= longest and HELD_S <= sums["inference"] <= longest
    assert 2 * HELD_S <= sums["request"] <= 2 * longest


class Asked(Gated):
    """Keeps what it was asked to continue."""

    leftovers: list[Leftover | None]

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.leftovers.append(kwargs.get("leftover"))
        return super().infer(*args, **kwargs)


def test_what_is_continued_is_what_the_guards_let_through() -> None:
    """The robot executes the clipped chunk; the one before the guards was never sent."""
    limits = tuple((-0.2, 0.2) for _ in range(7))
    held = gated(guards=Guards(on_violation="clip", limits=limits))
    held.leftovers = []  # type: ignore[attr-defined]
    held.__class__ = Asked
    with serving(lambda: held) as running, connect(running.port) as connection:
        first = ask(connection, **observation(), pi0_engine={"seed": 0})
        assert first["guards"]["applied"] == "clip"
        ask(connection, **observation(), pi0_engine={"rtc": {"executed": 3, "delay": 1}})
    continued = held.leftovers[-1]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(continued.actions, first["actions"][3:])
    assert np.abs(continued.actions).max() == np.float32(0.2)


def chunk(rng: np.random.Generator) -> NDArray[np.float32]:
    actions: NDArray[np.float32] = policy().infer(observation(), noise=noise(rng))["actions"]
    return actions


def test_a_reset_without_a_seed_goes_on_with_the_noise_of_a_seeded_server() -> None:
    rng = np.random.default_rng((11, 0))
    with serving(service=ServiceOptions(seed=11)) as running, connect(running.port) as connection:
        np.testing.assert_array_equal(ask(connection, **observation())["actions"], chunk(rng))
        ask(connection, pi0_engine={"reset": True})
        np.testing.assert_array_equal(ask(connection, **observation())["actions"], chunk(rng))
        answer = ask(connection, **observation(), pi0_engine={"reset": True})
        np.testing.assert_array_equal(answer["actions"], chunk(rng))
        answer = ask(connection, **observation(), pi0_engine={"reset": True, "seed": 4})
        np.testing.assert_array_equal(answer["actions"], chunk(np.random.default_rng(4)))


def test_what_was_refused_is_recorded_with_its_reason(tmp_path: Path) -> None:
    """What a robot was not allowed to do is what somebody will look for."""
    limits = tuple((-0.2, 0.2) for _ in range(7))
    held = gated(guards=Guards(on_violation="refuse", limits=limits))
    service = Service(lambda: held, record=lambda loaded: Recorder(tmp_path, {"robot": loaded.robot.name}))
    with BackgroundServer(service, ServerOptions(port=0)) as running, connect(running.port) as connection:
        assert ask(connection, **observation(), pi0_engine={"seed": 0, "request": "a"})["code"] == "guard_violation"
        held.failures = [NotFiniteError("the network's actions contain NaN or infinity")]
        assert ask(connection, **observation(), pi0_engine={"seed": 5, "request": "b"})["code"] == "not_finite"
    records = list(Recording(tmp_path))
    assert [entry.reply["error"]["code"] for entry in records] == ["guard_violation", "not_finite"]
    assert [entry.control["request"] for entry in records] == ["a", "b"]
    for entry, seed in zip(records, (0, 5), strict=True):
        np.testing.assert_array_equal(entry.noise, noise(np.random.default_rng(seed)))
    assert "limit 0.2" in records[0].reply["error"]["message"]


@pytest.mark.parametrize("name", ["queue_ms", "infer_ms"])
def test_an_idle_server_reports_no_time_that_did_not_pass(name: str) -> None:
    with serving() as running, connect(running.port) as connection:
        started = time.perf_counter()
        answer = ask(connection, **observation())
        assert 0 <= answer["server_timing"][name] <= 1e3 * (time.perf_counter() - started)

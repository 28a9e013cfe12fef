"""A robot's declared limits in the control loop: guards in process, velocity across chunks, rate, solvers, TLS."""

from __future__ import annotations

import dataclasses
import shutil
import ssl
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("websockets", reason="the client is part of the extra 'serve'")
pytest.importorskip("msgpack", reason="the client is part of the extra 'serve'")

from pi0_engine.client import ChunkRunner, PolicyClient
from pi0_engine.client.declared import Declared
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.guards import Guards
from pi0_engine.serving.background import BackgroundServer
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service
from tests.support import serving
from tests.support.websocket_servers import METADATA, policy_server

HZ = 50.0


def guarded(**guards: Any) -> Pi0Policy:
    """A policy for a robot of so many actions per second with these guards."""
    made = serving.fresh_policy()
    robot = dataclasses.replace(made.transform.robot, guards=Guards(**guards), control_hz=HZ)
    return Pi0Policy(made.engine, dataclasses.replace(made.transform, robot=robot))


def drive(runner: ChunkRunner, steps: int, *, chunks: int = 3) -> list[NDArray[np.float32]]:
    """Step until so many chunks have taken over and so many actions were sent; gives what was sent."""
    sent: list[NDArray[np.float32]] = []
    give_up = time.monotonic() + serving.PATIENCE_S
    while len(sent) < steps or runner.statistics.accepted < chunks:
        assert time.monotonic() < give_up, runner.statistics.to_dict()
        action = runner.step(lambda: serving.observation())
        if action is not None:
            sent.append(action)
        time.sleep(0.002)
    return sent


def test_clip_applies_in_process_as_on_a_server() -> None:
    policy = guarded(on_violation="clip", limits=((-0.01, 0.01),) * 7)
    with ChunkRunner(policy, control_hz=HZ, hold="last", watchdog_s=60) as runner:
        sent = np.stack(drive(runner, 20))
    assert np.abs(sent).max() <= np.float32(0.01)
    assert runner.statistics.guarded["clip"] == runner.statistics.accepted > 0


def test_refuse_applies_in_process_as_on_a_server() -> None:
    policy = guarded(on_violation="refuse", limits=((-0.01, 0.01),) * 7)
    with ChunkRunner(policy, control_hz=HZ, hold="last", watchdog_s=60) as runner:
        give_up = time.monotonic() + serving.PATIENCE_S
        while runner.statistics.errors["guard_violation"] < 2:
            assert time.monotonic() < give_up
            assert runner.step(serving.observation()) is None
            time.sleep(0.002)
    assert runner.statistics.accepted == 0 and runner.statistics.executed == 0


def test_an_observation_that_is_too_old_is_refused_in_process() -> None:
    ticks = iter(range(10_000))
    policy = guarded(max_observation_age_ms=10)
    # Every look at the clock is a second later.
    with ChunkRunner(policy, control_hz=HZ, hold="last", watchdog_s=1e6, clock=lambda: float(next(ticks))) as runner:
        give_up = time.monotonic() + serving.PATIENCE_S
        while runner.statistics.errors["stale_observation"] < 1:
            assert time.monotonic() < give_up
            runner.step(serving.observation())
            time.sleep(0.002)
    assert runner.statistics.accepted == 0


@pytest.mark.parametrize("where", ["in process", "over the wire"])
def test_the_velocity_holds_across_chunks(where: str) -> None:
    """Chunks of random weights begin anywhere; without rtc every seam is a jump."""
    policy = guarded(on_violation="clip", max_velocity=(1.0,) * 6 + (None,), max_jump=(0.2,) * 7)
    step = np.float32(1.0 / HZ)

    def check(runner: ChunkRunner) -> None:
        sent = np.stack(drive(runner, 60, chunks=6))
        moved = np.abs(np.diff(sent[:, :6], axis=0)).max()
        assert 0 < moved <= step * (1 + 1e-5)
        assert runner.statistics.limited > 0 and max(runner.statistics.seam_jumps) > step

    options: dict[str, Any] = {"control_hz": HZ, "hold": "last", "rtc": False, "watchdog_s": 60}
    if where == "in process":
        with ChunkRunner(policy, **options) as runner:
            check(runner)
        return
    with (
        BackgroundServer(Service(lambda: policy), ServerOptions(port=0)) as server,
        PolicyClient(f"ws://127.0.0.1:{server.port}", reply_timeout_s=serving.PATIENCE_S) as client,
        ChunkRunner(client, **options) as runner,
    ):
        check(runner)


def test_a_loop_faster_than_the_robot_is_refused() -> None:
    policy = guarded(max_observation_age_ms=1000)
    assert Declared.of(policy) == Declared(HZ, None)
    with pytest.raises(ValueError, match="control_hz is 60, but the policy's robot is declared with 50 actions"):
        ChunkRunner(policy, control_hz=60, hold="last")
    ChunkRunner(policy, control_hz=25, hold="last").close()
    metadata = {**METADATA, "control_hz": 20.0, "guards": {"max_velocity": [1.0, None, 2.0]}}
    with policy_server(metadata=metadata) as server, PolicyClient(server.uri) as client:
        assert Declared.of(client).max_step == pytest.approx([0.05, np.inf, 0.1])
        with pytest.raises(ValueError, match="declared with 20 actions"):
            ChunkRunner(client, control_hz=20.1, hold="last")
    with policy_server(metadata={**metadata, "server": "another"}) as server, PolicyClient(server.uri) as client:
        assert Declared.of(client) == Declared()
    assert Declared.of(object()).max_step is None


def test_a_solver_that_cannot_be_guided_moves_the_robot_without_continuing(caplog: pytest.LogCaptureFixture) -> None:
    policy = serving.fresh_policy(solver="midpoint")
    assert policy.no_rtc is not None and serving.policy().no_rtc is None
    with ChunkRunner(policy, control_hz=HZ, hold="last", watchdog_s=60) as runner:
        drive(runner, 20)
    assert not runner.statistics.errors
    with policy_server(metadata={**METADATA, "rtc": None}) as server, PolicyClient(server.uri) as client:
        ChunkRunner(client, control_hz=HZ, hold="last").close()
    assert sum("will not continue each other" in record.message for record in caplog.records) == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: it makes the certificate")
def test_a_certificate_of_one_s_own(tmp_path: Path) -> None:
    cert, key = serving.certificate(tmp_path, "-nodes")
    with serving.serving(tls_cert=cert, tls_key=key) as server:
        address = f"wss://127.0.0.1:{server.port}"
        with PolicyClient(address, tls=ssl.create_default_context(cafile=cert)) as client:
            assert np.shape(client.infer(serving.observation())["actions"]) == (10, 7)
    with pytest.raises(ValueError, match="tls is given for 'ws://"):
        PolicyClient("ws://127.0.0.1:1", tls=ssl.create_default_context())

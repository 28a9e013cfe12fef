"""How long an answer takes, shell by shell: engine, with pre- and post-processing, policy, websocket round trip.

Every shell contains the one before it. They are timed in turn, round after round, so that a machine that gets slower
meanwhile gets slower for all of them. What the server costs beyond the engine is taken from single requests: the round
trip that the client measured less the engine's time that the reply to it reports. Beside it stands an echo, which no
server can beat: the same bytes there and back by the same library, with nothing done to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.engine.machine import describe_machine
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.normalization import NormStats
from pi0_engine.serving.background import BackgroundServer
from pi0_engine.serving.example import example_observation
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service
from pi0_engine.serving.wire import packb, unpackb
from pi0_engine.text.files import demo_tokenizer

#: The shells from the inside out.
SHELLS = ("engine", "with pre- and post-processing", "Pi0Policy.infer", "websocket round trip")
#: Fifty actions of 14 joints, and the rest.
_REPLY_BYTES = 3_500
_ALOHA_CAMERAS = ("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist")


def measure_shells(
    config: Pi0Config,
    engine: EngineConfig,
    *,
    views: int = 3,
    side: int = 224,
    runs: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Time an ALOHA observation on random weights through every shell.

    The client of the round trip is a process of its own, as a robot's is; the server shares this process with nothing.

    Args:
        config: the model.
        engine: device, dtype and backend.
        views: cameras, 1 to 3.
        side: of the square frames, in pixels.
        runs: timed rounds, after 5 to warm up.
        seed: of weights, frames, state and noise.

    Returns:
        ``shells``: {shell: {p50_ms, p99_ms}}; ``beyond_engine``: of the round trip, paired by request; ``echo``: of the
        same bytes without a server; ``observation``: views, side and the message's bytes; ``machine``, ``model``,
        ``dtype``, ``runs``.

    Raises:
        ValueError: numbers out of range.
    """
    if not 1 <= views <= len(_ALOHA_CAMERAS):
        raise ValueError(f"views is {views}, expected 1 to {len(_ALOHA_CAMERAS)}: the observation is an ALOHA's")
    if runs < 1:
        raise ValueError(f"runs is {runs}, expected at least 1")
    policy = Pi0Policy.from_checkpoint(
        RandomCheckpoint(config, seed),
        robot="aloha",
        config=config,
        engine=engine,
        tokenizer=demo_tokenizer(),
        norm_stats=NormStats.identity(),
        progress=progress,
    )
    observation = example_observation(policy.transform.robot, side=side, seed=seed)
    for camera in policy.transform.robot.cameras:
        if camera.key not in _ALOHA_CAMERAS[:views]:
            del observation[camera.key]
    message = packb(observation)
    shells = _inner_shells(policy, observation, seed)
    times: dict[str, list[float]] = {shell: [] for shell in SHELLS}
    beyond, echoes = [], []
    ours, theirs = multiprocessing.Pipe()
    with (
        _process(_echo, theirs),
        BackgroundServer(Service(lambda: policy), ServerOptions(port=0)) as server,
        _process(_client, server.port, ours.recv(), message, theirs),
    ):
        theirs.close()
        for number in tqdm(range(-5, runs), "shells", disable=not progress, leave=False):
            # Client and echo have both been asleep for as long as an inference takes, as on a robot.
            ours.send("echo")
            echo, _ = ours.recv()
            round_times = {shell: _timed(call) for shell, call in shells.items()}
            ours.send("observation")
            round_times[SHELLS[-1]], timing = ours.recv()
            shells[SHELLS[0]]()
            if number < 0:
                continue
            for shell, milliseconds in round_times.items():
                times[shell].append(milliseconds)
            echoes.append(echo)
            beyond.append(round_times[SHELLS[-1]] - _engine_ms(timing))
    return {
        "shells": {shell: _percentiles(values) for shell, values in times.items()},
        "beyond_engine": _percentiles(beyond),
        "echo": _percentiles(echoes),
        "observation": {"views": views, "side": side, "message_bytes": len(message)},
        "machine": describe_machine(torch.device(engine.device)),
        "model": config.model_type,
        "dtype": policy.engine.describe()["dtype"],
        "runs": runs,
    }


@contextlib.contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """A process of its own, however it is left: one that goes on would keep the interpreter from ending."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _inner_shells(policy: Pi0Policy, observation: dict[str, Any], seed: int) -> dict[str, Callable[[], Any]]:
    transform, sizes = policy.transform, (policy.config.action_horizon, policy.config.action_dim)
    noise = np.random.default_rng(seed).standard_normal(sizes, dtype=np.float32)
    prepared, _ = transform.prepare(observation)
    start = noise[None, None]

    def processed() -> None:
        inputs, context = transform.prepare(observation)
        transform.finish(policy.engine.infer(inputs, start).actions, context)

    calls = (lambda: policy.engine.infer(prepared, start), processed, lambda: policy.infer(observation, noise=noise))
    return dict(zip(SHELLS, calls, strict=False))


def _engine_ms(timing: dict[str, float]) -> float:
    """Of one request: all of ``Pi0Policy.infer`` but what comes before and after the engine."""
    return timing["infer_ms"] - timing["prepare_ms"] - timing["finish_ms"]


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def _client(port: int, echo_port: int, message: bytes, control: Connection) -> None:
    """One round trip, packing and unpacking included, or one echo, as it is told; ends when ``control`` is closed."""
    import websockets.sync.client as websocket

    observation, limits = unpackb(message), {"compression": None, "max_size": None}
    with (
        websocket.connect(f"ws://127.0.0.1:{port}", **limits) as connection,
        websocket.connect(f"ws://127.0.0.1:{echo_port}", **limits) as echo,
    ):
        connection.recv()
        while True:
            try:
                asked = control.recv()
            except EOFError:
                return
            timing = {}
            started = time.perf_counter()
            if asked == "echo":
                echo.send(message)
                echo.recv(decode=False)
            else:
                connection.send(packb(observation))
                timing = unpackb(connection.recv(decode=False))["policy_timing"]
            control.send((1e3 * (time.perf_counter() - started), timing))


def _echo(control: Connection) -> None:
    """Sends its port, then for ever the head of every message back, as long as a reply of the server."""
    from websockets.asyncio.server import ServerConnection, serve

    async def answer(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message[:_REPLY_BYTES])

    async def listen() -> None:
        async with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
            control.send(server.sockets[0].getsockname()[1])
            control.close()  # the client's end of it alone tells whether there is a client
            await asyncio.get_running_loop().create_future()

    asyncio.run(listen())

"""A small policy behind a real server, in this process or in one of its own. For tests to import."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0_engine.client.simulated import StillEngine
from pi0_engine.config import EngineConfig, GemmaConfig, Pi0Config, SiglipConfig, SolverName
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.normalization import NormStats
from pi0_engine.robots.transforms import ObservationTransform
from pi0_engine.serving.background import BackgroundServer
from pi0_engine.serving.example import example_observation
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service, ServiceOptions
from pi0_engine.text.files import demo_tokenizer
from pi0_engine.text.tokenizer import load_tokenizer
from pi0_engine.torch_needed import has_torch

#: A hang is a failure after so many seconds; nothing here takes a tenth of it on a quiet machine.
PATIENCE_S = 120

SIZES: dict[str, Any] = {
    "model_type": "pi0",
    "vision": {"width": 36, "depth": 2, "num_heads": 3, "mlp_dim": 52, "image_size": 28},
    "llm": {
        "width": 40, "depth": 2, "mlp_dim": 56, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16, "vocab_size": 2048,
    },
    "expert": {"width": 28, "depth": 2, "mlp_dim": 44, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
    "action_dim": 32,
    "max_token_len": 48,
    "action_horizon": 10,
    "num_steps": 3,
}  # fmt: skip


def config() -> Pi0Config:
    """A π0 that answers in a few milliseconds."""
    towers = {"vision": SiglipConfig, "llm": GemmaConfig, "expert": GemmaConfig}
    return Pi0Config(**{key: towers[key](**value) if key in towers else value for key, value in SIZES.items()})


@functools.cache
def policy(robot: str | Robot = "libero", weights: int = 0) -> Pi0Policy:
    return fresh_policy(robot, weights)


def fresh_policy(robot: str | Robot = "libero", weights: int = 0, solver: SolverName = "euler") -> Pi0Policy:
    """With a network of random weights; where there is no torch, with one that stands still."""
    if not has_torch():
        tokenizer = load_tokenizer(demo_tokenizer(), config())
        transform = ObservationTransform(get_robot(robot), NormStats.identity(), tokenizer, config())
        return Pi0Policy(StillEngine(config(), solver), transform)
    from pi0_engine.checkpoints.random_weights import RandomCheckpoint

    return Pi0Policy.from_checkpoint(
        RandomCheckpoint(config(), weights),
        robot=robot,
        config=config(),
        engine=EngineConfig(dtype="float32", solver=solver),
        tokenizer=demo_tokenizer(),
        norm_stats=NormStats.identity(),
    )


#: Of tests that start ``pi0-engine serve``: its policy has a network, whatever stands in for it here.
needs_torch = pytest.mark.skipif(not has_torch(), reason="it runs a network, which needs torch")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads of so small a model wait for each other, long on a busy machine; and two may round a sum otherwise."""
    if not has_torch():
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def observation(robot: str | Robot = "libero", seed: int = 0) -> dict[str, Any]:
    return example_observation(get_robot(robot), side=32, seed=seed)


def noise(rng: np.random.Generator) -> NDArray[np.float32]:
    """What a session draws for its next chunk."""
    sizes = config()
    return rng.standard_normal((sizes.action_horizon, sizes.action_dim), dtype=np.float32)


def serving(
    load: Callable[[], Pi0Policy] = policy, *, service: ServiceOptions | None = None, **options: Any
) -> BackgroundServer:
    """A server on a free port of this machine."""
    return BackgroundServer(Service(load, service), ServerOptions(port=0, **options))


def certificate(folder: Path, *options: str) -> tuple[Path, Path]:
    """A self-signed one for 127.0.0.1 and its key, as files; openssl makes them."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1", "-subj", "/CN=localhost", *options]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@contextlib.contextmanager
def process(
    tmp_path: Path,
    *arguments: str,
    robot: str = "libero",
    port: int = 0,
    program: Sequence[str] = ("-m", "pi0_engine.cli"),
) -> Iterator[tuple[Any, int]]:
    """``pi0-engine serve`` with the small model: the process and its port. Killed at the end if it is still there.

    Args:
        program: of Python, which runs the command.
    """
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(SIZES))
    command = [sys.executable, *program, "serve", "--robot", robot, "--config", str(sizes)]
    command += ["--random-weights", "0", "--dtype", "float32", "--port", str(port), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # such small products only wait for a second thread, long on a busy machine
    with open(tmp_path / "log", "ab") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line.startswith("ready on ws"), (line, (tmp_path / "log").read_text())
        yield child, int(line.rpartition(":")[2])
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait(PATIENCE_S)
        if child.stdout is not None:
            child.stdout.close()

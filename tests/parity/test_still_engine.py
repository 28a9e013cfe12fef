"""The engine whose network stands still is an engine like any other: the real one, told to stand still, agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.client.simulated import StillEngine
from pi0_engine.config import EngineConfig
from pi0_engine.engine.runtime import Engine
from pi0_engine.rtc.guidance import Continuation, FixedPrefix, Guide
from pi0_engine.rtc.schedule import prefix_weights
from tests.support.models import random_inputs, random_noise, small_config


class Still(RandomCheckpoint):
    """Weights whose velocity is 0."""

    def tensor(self, name: str) -> torch.Tensor:
        drawn = super().tensor(name)
        return torch.zeros_like(drawn) if name.startswith("action_out_proj") else drawn


def earlier(seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((1, 5, 7), dtype=np.float32)


@pytest.mark.parametrize(
    ("model", "continuation"),
    [
        ("pi0", None),
        ("pi0", Guide(earlier(), prefix_weights("exp", 1, 4, 5)[None], 10.0)),
        ("pi05", Guide(earlier(), prefix_weights("linear", 2, 5, 5)[None], 0.5)),
        ("pi05", FixedPrefix(earlier(), (3,))),
    ],
)
@pytest.mark.parametrize("num_steps", [4, 10])
def test_chunks_are_the_real_engines(model: Any, continuation: Continuation | None, num_steps: int) -> None:
    config = small_config(model)
    inputs, noise = random_inputs(config), random_noise(config, samples=2).numpy()
    real = Engine(Still(config), EngineConfig(dtype="float32", backend="torch"))
    expected = real.infer(inputs, noise, num_steps=num_steps, continuation=continuation).actions.numpy()
    found = StillEngine(config).infer(inputs, noise, num_steps=num_steps, continuation=continuation).actions
    # Each step rounds three or four results of at most this size, and a pull of at most 1 makes no error larger.
    size = np.abs(noise).max() + (0.0 if continuation is None else np.abs(continuation.previous).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=num_steps * 4 * 2.0**-24 * size)


def test_what_the_real_engine_refuses_is_refused() -> None:
    config = small_config("pi0")
    engine, inputs, noise = StillEngine(config), random_inputs(config), random_noise(config).numpy()
    with pytest.raises(ValueError, match=r"previous is float32 \[1, 5, 7\], expected float32 \[1, 3, 7\]"):
        engine.infer(inputs, noise[:, :, :3], continuation=Guide(earlier(), np.ones((1, 5), np.float32), 1.0))
    with pytest.raises(ValueError, match="num_steps is 0, expected at least 1"):
        engine.infer(inputs, noise, num_steps=0)
    for other in (noise[0], noise[..., :6], noise * np.float32(np.nan)):
        with pytest.raises(ValueError, match=r"expected finite \[1, samples, horizon, 7\]"):
            engine.infer(inputs, other)

"""What a simulation is made of: two arms that see nothing new, and a small π0 that changes its mind all the time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.config import EngineConfig, GemmaConfig, Pi0Config, SiglipConfig
from pi0_engine.normalization import Normalizer, NormStats
from pi0_engine.policy import Pi0Policy
from pi0_engine.random_weights import RandomCheckpoint
from pi0_engine.robots import Robot, get_robot
from pi0_engine.rtc import Leftover, RtcConfig
from pi0_engine.tokenizer_files import demo_tokenizer

#: Standard deviation of an action of the model's in a joint's units: rad.
_SPREAD = 0.2
#: Runs in milliseconds: its chunks mean nothing, but come from the same code as any other's.
MODEL = Pi0Config(
    "pi0",
    vision=SiglipConfig(width=48, depth=2, num_heads=2, mlp_dim=96, image_size=28),
    llm=GemmaConfig(64, 2, 128, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=2048),
    expert=GemmaConfig(64, 2, 128, num_heads=2, num_kv_heads=1, head_dim=32),
    max_token_len=48,
    action_horizon=50,
)


class NoisyPolicy:
    """A π0 of random weights whose chunks look like motions.

    Such a chunk is mostly the noise that it starts from. Noise that is smooth over the chunk gives smooth motions, a
    new one with every inference: the worst case of a policy that changes its mind, which is what makes seams.
    """

    def __init__(self, policy: Pi0Policy, seed: int) -> None:
        self._policy, self._rng = policy, np.random.default_rng([seed, 1])

    def reset(self) -> None:
        self._policy.reset()

    def infer(self, observation: Mapping[str, Any], *, leftover: Leftover | None = None) -> dict[str, Any]:
        return self._policy.infer(observation, noise=self._noise(), leftover=leftover)

    def _noise(self) -> NDArray[np.float32]:
        """float32 [H, action_dim]: three slow waves per dimension, of random height and phase."""
        config = self._policy.config
        waves = np.arange(1, 4)[:, None, None]
        time = np.arange(config.action_horizon)[None, :, None] / config.action_horizon
        heights = self._rng.standard_normal((3, 1, config.action_dim)) / waves
        phases = self._rng.uniform(0, 2 * np.pi, (3, 1, config.action_dim))
        noise: NDArray[np.float32] = (heights * np.sin(np.pi * waves * time + phases)).sum(axis=0).astype(np.float32)
        return noise


class SimulatedRobot:
    """Joints that are where they were last told to be, and cameras that see nothing new."""

    def __init__(self) -> None:
        robot = two_arms()
        random = np.random.default_rng(0)
        self._frames = {
            camera.key.removeprefix("images/"): random.integers(0, 256, (3, 28, 28), dtype=np.uint8)
            for camera in robot.cameras
            if camera.slot is not None
        }
        self._joints = np.zeros(robot.state_dim, np.float32)
        self.last: NDArray[np.float32] | None = None

    def observe(self) -> dict[str, Any]:
        return {"state": self._joints.copy(), "images": self._frames}

    def act(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        self.last = self._joints = action.copy()
        return self.last


def two_arms() -> Robot:
    """Two arms of seven joints each; a command is fourteen angles."""
    return dataclasses.replace(get_robot("aloha_sim"), state_maps=(), action_maps=(), action_horizon={})


@functools.lru_cache(maxsize=2)
def small_policy(rtc: RtcConfig) -> Pi0Policy:
    dims = two_arms().action_dim
    return Pi0Policy.from_checkpoint(
        RandomCheckpoint(MODEL, seed=0),
        robot=two_arms(),
        engine=EngineConfig(dtype="float32"),
        tokenizer=demo_tokenizer(),
        norm_stats=NormStats(
            Normalizer.identity(), Normalizer.zscore(np.zeros(dims), np.full(dims, _SPREAD)), "of the simulation"
        ),
        rtc=rtc,
    )

"""What a simulation is made of: two arms that see nothing new, and a policy that changes its mind all the time.

The policy is a real :class:`Pi0Policy` but for its network, which stands still: so a robot's computer without torch can
simulate too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.config import EngineConfig, GemmaConfig, Pi0Config, SiglipConfig, SolverName
from pi0_engine.inputs import ModelInputs
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.normalization import Normalizer, NormStats
from pi0_engine.robots.transforms import ObservationTransform
from pi0_engine.rtc.guidance import Continuation, FixedPrefix, Guide, check_guidable, guidance_weight
from pi0_engine.rtc.schedule import Leftover, RtcConfig
from pi0_engine.text.files import demo_tokenizer
from pi0_engine.text.tokenizer import load_tokenizer

#: Standard deviation of an action of the model's in a joint's units: rad.
_SPREAD = 0.2
#: Of what the observation becomes; nothing computes with it.
MODEL = Pi0Config(
    "pi0",
    vision=SiglipConfig(width=48, depth=2, num_heads=2, mlp_dim=96, image_size=28),
    llm=GemmaConfig(64, 2, 128, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=2048),
    expert=GemmaConfig(64, 2, 128, num_heads=2, num_kv_heads=1, head_dim=32),
    max_token_len=48,
    action_horizon=50,
)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Actions float32 [B, samples, H, action_dim], normalised; nothing is timed."""

    actions: NDArray[np.float32]
    seconds: dict[str, float]


class StillEngine:
    """The flow of a network whose velocity is 0: a chunk is the noise that it starts from.

    Unless it continues another. It is pulled towards that one then, by the same steps as any engine's.
    """

    def __init__(self, config: Pi0Config, solver: SolverName = "euler") -> None:
        self.config, self.engine_config = config, EngineConfig(dtype="float32", solver=solver)

    def infer(
        self,
        inputs: ModelInputs,
        noise: NDArray[np.float32],
        *,
        num_steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Drawn:
        inputs.validate(self.config)
        steps = self.config.num_steps if num_steps is None else num_steps
        if isinstance(continuation, Guide):
            check_guidable(self.engine_config.solver)
        if continuation is not None:
            continuation.validate(self.config, inputs.batch, noise.shape[2], steps)
        if steps < 1:
            raise ValueError(f"num_steps is {steps}, expected at least 1")
        if (
            noise.ndim != 4
            or noise.shape[::3] != (inputs.batch, self.config.action_dim)
            or not np.isfinite(noise).all()
        ):
            expected = f"finite [{inputs.batch}, samples, horizon, {self.config.action_dim}]"
            raise ValueError(f"noise is {noise.dtype} {list(noise.shape)}, expected {expected}")
        x = noise.astype(np.float32)
        if isinstance(continuation, Guide):
            previous, weights = continuation.previous[:, None], continuation.weights[:, None, :, None]
            for step in range(steps):
                pull = min(guidance_weight(1 - step / steps), continuation.max_weight)
                x += np.float32(pull / steps) * weights * (previous - x)
        elif isinstance(continuation, FixedPrefix):
            x = np.where(continuation.given()[:, None, :, None], continuation.previous[:, None], x)
        return Drawn(x, {})

    def warm_up(self, **sizes: Any) -> None:
        """There is nothing to make ready."""

    def describe(self) -> dict[str, Any]:
        return {"device": "none", "dtype": "float32"}


class NoisyPolicy:
    """A policy whose chunks look like motions.

    A chunk is the noise that it starts from. Noise that is smooth over the chunk gives smooth motions, a new one with
    every inference: the worst case of a policy that changes its mind, which is what makes seams.
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


def still_policy(rtc: RtcConfig) -> Pi0Policy:
    """Between the two arms and a network that stands still."""
    robot = two_arms()
    dims = robot.action_dim
    transform = ObservationTransform(
        robot=robot,
        stats=NormStats(
            Normalizer.identity(), Normalizer.zscore(np.zeros(dims), np.full(dims, _SPREAD)), "of the simulation"
        ),
        tokenizer=load_tokenizer(demo_tokenizer(), MODEL),
        config=MODEL,
    )
    return Pi0Policy(StillEngine(MODEL), transform, rtc=rtc)

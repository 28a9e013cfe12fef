"""lerobot's own tools on the plug-in's policies: ``lerobot-eval`` and the real-time chunking loop of rollouts."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc import RTCConfig
from lerobot.rollout.inference.rtc import RTCInferenceEngine, supports_rtc_inference
from lerobot.scripts import lerobot_eval
from lerobot_policy_pi0_engine.__main__ import link_checkpoint

from tests.lerobot.small_policies import IMAGES, small_policy, small_sizes, worst

JOINTS = 6
STATISTICS = {
    key: {name: torch.full((JOINTS,), value) for name, value in (("mean", 0.1), ("std", 0.5))}
    for key in ("observation.state", "action")
}


class ToyArm(gym.Env):
    """Six joints that go where they are told, slowly, in front of two cameras that see them."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Dict(
        {
            "agent_pos": gym.spaces.Box(-np.inf, np.inf, (JOINTS,), np.float64),
            "pixels": gym.spaces.Dict(
                {camera: gym.spaces.Box(0, 255, (32, 48, 3), np.uint8) for camera in ("top", "wrist")}
            ),
        }
    )
    action_space = gym.spaces.Box(-np.inf, np.inf, (JOINTS,), np.float32)
    render_mode = "rgb_array"
    task = task_description = "turn it left"
    #: Of all episodes, in order. Gymnasium makes the environments, so they report here.
    actions: ClassVar[list[np.ndarray]] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.joints = self.np_random.standard_normal(JOINTS)
        torch.manual_seed(5)  # lerobot's policy has drawn random weights before it loaded others, ours has not
        return self.look(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.actions.append(np.array(action))
        self.joints = 0.8 * self.joints + 0.2 * action
        return self.look(), 0.0, False, False, {"is_success": False}

    def look(self) -> dict[str, Any]:
        column = (np.tanh(self.joints).repeat(8) * 100 + 128).astype(np.uint8)  # one stripe per joint
        frame = np.broadcast_to(column[None, :, None], (32, 48, 3)).copy()
        return {"agent_pos": self.joints.copy(), "pixels": {"top": frame, "wrist": frame[::-1].copy()}}

    def render(self) -> np.ndarray:
        return self.look()["pixels"]["top"]


@EnvConfig.register_subclass("toyarm")
@dataclass
class ToyArmConfig(EnvConfig):
    task: str | None = "ToyArm-v0"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (JOINTS,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (JOINTS,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (32, 48, 3)),
            "pixels/wrist": PolicyFeature(FeatureType.VISUAL, (32, 48, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels/top": f"{IMAGES}.top",
            "pixels/wrist": f"{IMAGES}.wrist",
        }
    )

    @property
    def gym_kwargs(self) -> dict:
        return {"max_episode_steps": 10}


gym.register("gym_toyarm/ToyArm-v0", ToyArm, max_episode_steps=10)


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, Path]:
    """lerobot's π0 with its processors, and the same linked as ours."""
    policy = small_policy("pi0", empty_cameras=0)
    policy.save_pretrained(tmp_path / "pi0")
    for processor in make_pre_post_processors(policy.config, dataset_stats=STATISTICS):
        processor.save_pretrained(tmp_path / "pi0")
    link_checkpoint(str(tmp_path / "pi0"), tmp_path / "pi0_engine")
    return {name: tmp_path / name for name in ("pi0", "pi0_engine")}


def test_lerobot_eval(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two episodes of ten steps, from the command line: the arm is told the same by both policies."""
    monkeypatch.chdir(tmp_path)
    told = {}
    for name, path in checkpoints.items():
        options = ["--env.type=toyarm", "--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false"]
        output = tmp_path / f"eval_{name}"
        arguments = [f"--policy.path={path}", "--policy.device=cpu", "--seed=7", f"--output_dir={output}", *options]
        monkeypatch.setattr(sys, "argv", ["lerobot-eval", *arguments])
        ToyArm.actions.clear()
        with small_sizes():
            lerobot_eval.main()
        told[name] = torch.from_numpy(np.stack(ToyArm.actions))
        assert (output / "eval_info.json").is_file()
    assert told["pi0"].shape == (20, JOINTS) and told["pi0"].std() > 0.1
    assert worst(told["pi0_engine"], told["pi0"]) <= 1e-3  # an arm feeds its differences back


def test_rollouts_with_real_time_chunking(checkpoints: dict[str, Path]) -> None:
    """lerobot's own background loop: it asks for chunks with what is left of the last one, and none fails."""
    with small_sizes():
        policy = get_policy_class("pi0_engine").from_pretrained(checkpoints["pi0_engine"])
    assert supports_rtc_inference(policy)
    policy.config.rtc_config = RTCConfig(execution_horizon=6)
    policy.init_rtc_processor()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(checkpoints["pi0_engine"]))
    names = [f"joint_{index}.pos" for index in range(JOINTS)]
    features: dict[str, Any] = {"observation.state": {"dtype": "float32", "shape": (JOINTS,), "names": names}}
    for camera in ("top", "wrist"):
        features[f"{IMAGES}.{camera}"] = {
            "dtype": "video",
            "shape": (32, 48, 3),
            "names": ["height", "width", "channels"],
        }
    loop = RTCInferenceEngine(
        policy,
        before,
        after,
        SimpleNamespace(robot_type="toy", action_features=dict.fromkeys(names, float)),
        policy.config.rtc_config,
        features,
        task="turn it left",
        fps=200,
        device="cpu",
        rtc_queue_threshold=10,
    )
    continued = []
    sample_actions = policy.model.sample_actions

    def count(*arguments: Any, **rtc: Any) -> torch.Tensor:
        continued.append(rtc["prev_chunk_left_over"] is not None)
        return sample_actions(*arguments, **rtc)

    policy.model.sample_actions = count
    arm = ToyArm()
    seen, _ = arm.reset(seed=1)
    received = []
    loop.start()
    loop.resume()
    try:
        deadline = time.monotonic() + 60
        while len(received) < 60 and time.monotonic() < deadline and not loop.failed:
            loop.notify_observation({**dict(zip(names, seen["agent_pos"], strict=True)), **seen["pixels"]})
            action = loop.get_action(None)
            if action is None:
                time.sleep(0.005)
                continue
            received.append(action)
            seen, *_ = arm.step(action.numpy())
    finally:
        loop.stop()
    assert not loop.failed and len(received) == 60
    assert len(continued) > 3 and not continued[0] and all(continued[1:])  # every chunk but the first
    assert all(torch.isfinite(action).all() for action in received)

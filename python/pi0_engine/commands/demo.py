"""``pi0-engine demo``: the whole way from camera frames to joint commands, in a second, without any download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pi0_engine.cases import Difference, sample_reference
from pi0_engine.commands.options import Dtype, table
from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.normalization import NormStats
from pi0_engine.plots import plot_chunk
from pi0_engine.policy import Pi0Policy
from pi0_engine.random_weights import RandomCheckpoint
from pi0_engine.reference import Pi0Reference
from pi0_engine.tokenizer_files import demo_tokenizer

DATA = Path(__file__).parents[1] / "data" / "demo"
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


@dataclass(frozen=True)
class Demo:
    """Run a small π0 on three camera frames of a two-armed robot and draw the action chunk.

    The weights are random (seed 0), so the motion means nothing; the arithmetic does: the chunk is compared with the
    plain PyTorch reference, which tests hold to openpi's recorded outputs.
    """

    prompt: str = "pick up the cup with the left arm"
    """The instruction."""
    num_samples: int = 3
    """Candidate chunks to draw from the same observation."""
    seed: int = 0
    """Of the noise."""
    dtype: Dtype = "float32"
    output: str = "demo.png"
    """Where the picture goes (.png, .svg or .pdf)."""

    def run(self) -> int:
        frames = {camera: _frame(camera) for camera in CAMERAS}
        observation = {
            "state": np.linspace(-0.4, 0.4, 14),
            "images": {name: frame.transpose(2, 0, 1) for name, frame in frames.items()},
            "prompt": self.prompt,
        }
        config = Pi0Config.load(DATA / "config.json")
        checkpoint = RandomCheckpoint(config, seed=0)
        policy = Pi0Policy.from_checkpoint(
            checkpoint,
            robot="aloha",
            engine=EngineConfig(dtype=self.dtype),
            tokenizer=demo_tokenizer(),
            norm_stats=NormStats.identity(),
        )
        policy.infer(observation, seed=self.seed, num_samples=self.num_samples)  # the first call allocates
        reply = policy.infer(observation, seed=self.seed, num_samples=self.num_samples)
        actions, state, timing = reply["actions"], reply["state"], reply["policy_timing"]
        print(f'instruction  "{self.prompt}"')
        print(f"observation  {len(frames)} frames of {frames['cam_high'].shape[1::-1]} pixels, {state.size} joints")
        print(
            f"chunk        {actions.shape[-2]} actions of {actions.shape[-1]} joints, {self.num_samples} candidates\n"
        )
        print(table(["stage", "ms"], [[name.removesuffix("_ms"), f"{ms:.2f}"] for name, ms in timing.items()]))
        difference = self._against_reference(policy, checkpoint, observation)
        print(f"\nparity       relative L2 {difference.rel_l2:.1e} against the float32 reference")
        plot_chunk(self.output, actions, f"π0 (random weights): {self.prompt}", frames)
        print(f"picture      {self.output}")
        return 0

    def _against_reference(
        self, policy: Pi0Policy, checkpoint: RandomCheckpoint, observation: dict[str, Any]
    ) -> Difference:
        inputs, _ = policy.transform.prepare(observation)
        rng = np.random.default_rng(self.seed)
        config = policy.config
        noise = torch.from_numpy(
            rng.standard_normal((1, 1, config.action_horizon, config.action_dim), dtype=np.float32)
        )
        reference = Pi0Reference.from_tensors(config, checkpoint.tensor)
        expected = sample_reference(reference, inputs, noise[0], config.num_steps)
        return Difference.between(policy.engine.infer(inputs, noise).actions[0], expected)


def _frame(camera: str) -> NDArray[np.uint8]:
    with Image.open(DATA / f"{camera}.jpg") as image:
        return np.asarray(image.convert("RGB"))

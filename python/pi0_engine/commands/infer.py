"""``pi0-engine infer``: one observation from files, one action chunk out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pi0_engine.commands.options import Backend, Dtype, Solver, print_json, show_progress, table
from pi0_engine.config import EngineConfig
from pi0_engine.model_options import ModelOptions
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.declaration import Camera, Robot
from pi0_engine.robots.files import get_robot


@dataclass(frozen=True)
class Infer:
    """Draw an action chunk for one observation given as files.

    Images and numbers are named by the robot's observation keys (docs/robots.md). Example:

        pi0-engine infer --checkpoint CHECKPOINT --robot libero_delta --prompt "pick up the bowl" \\
            --image observation/image=base.png observation/wrist_image=wrist.png \\
            --state observation/state=0.1,0,0.3,0,0,0,0.04,-0.04 --plot chunk.png
    """

    robot: str
    """'aloha', 'droid', 'libero', ..., or a declaration file."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    image: tuple[str, ...] = ()
    """KEY=FILE of each camera frame (png, jpeg, ...)."""
    state: tuple[str, ...] = ()
    """KEY=NUMBERS (separated by commas) or KEY=FILE.npy for each part of the state."""
    prompt: str | None = None
    """The instruction; the robot's default where not given."""
    tokenizer: str | None = None
    """Sentencepiece .model or tokenizer.json; looked for beside the checkpoint and in caches where not given."""
    norm_stats: str | None = None
    """Statistics file or directory; looked for in the checkpoint where not given."""
    asset_id: str | None = None
    """Which statistics, where the checkpoint has several."""
    num_samples: int = 1
    """Candidate chunks from one prefix."""
    num_steps: int | None = None
    """Flow steps; the checkpoint's (10) where not given."""
    solver: Solver = "euler"
    """Of the flow: 'midpoint' calls the network twice per flow step, the others once (docs/solvers.md)."""
    seed: int = 0
    """Of the noise."""
    device: str = "cpu"
    dtype: Dtype = "auto"
    backend: Backend = "auto"
    launch_configs: str | None = None
    """Launch configurations that `pi0-engine tune` wrote, instead of those shipped."""
    output: str | None = None
    """Save the actions, float32 [H, A] or [samples, H, A], to this .npy."""
    plot: str | None = None
    """Draw the chunk per joint into this .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        robot = get_robot(self.robot)
        observation = read_files(robot, self.image, self.state)
        policy = self._policy(robot)
        reply = policy.infer(
            observation, prompt=self.prompt, seed=self.seed, num_samples=self.num_samples, num_steps=self.num_steps
        )
        actions: NDArray[np.float32] = reply["actions"]
        if self.output:
            np.save(self.output, actions)
        if self.plot:
            from pi0_engine.measuring.plots import plot_chunk

            frames = {c.key: _upright(observation[c.key], c) for c in robot.cameras if c.key in observation}
            plot_chunk(self.plot, actions, f"{robot.name}: {self.prompt or robot.prompt}", frames)
        if self.json:
            print_json({key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in reply.items()})
        else:
            print(chunk_table(actions if actions.ndim == 2 else actions[0]))
            if actions.ndim == 3:
                print(f"(the first of {len(actions)} candidate chunks)")
            print("  ".join(f"{name} {ms:.1f}" for name, ms in reply["policy_timing"].items()))
        return 0

    def _policy(self, robot: Robot) -> Pi0Policy:
        return self.model.policy(
            robot,
            EngineConfig(
                device=self.device,
                dtype=self.dtype,
                backend=self.backend,
                launch_configs=self.launch_configs,
                solver=self.solver,
            ),
            tokenizer=self.tokenizer,
            norm_stats=self.norm_stats,
            asset_id=self.asset_id,
            progress=show_progress(self.json),
        )


def read_files(robot: Robot, images: tuple[str, ...], state: tuple[str, ...]) -> dict[str, Any]:
    """An observation from ``KEY=FILE`` images and ``KEY=NUMBERS`` states."""
    cameras = {camera.key: camera for camera in robot.cameras}
    observation: dict[str, Any] = {}
    for key, file in (_split(pair, "--image KEY=FILE") for pair in images):
        if key not in cameras:
            raise ValueError(f"--image {key}=...: robot {robot.name!r} has cameras {sorted(cameras)}")
        observation[key] = _read_image(file, cameras[key])
    for key, text in (_split(pair, "--state KEY=NUMBERS") for pair in state):
        observation[key] = _read_numbers(key, text)
    return observation


def _split(pair: str, expected: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not (key and equals and value):
        raise ValueError(f"{pair!r} is not of the form {expected}")
    return key, value


def _read_image(file: str, camera: Camera) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--image {camera.key}={file}: {error}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if camera.layout == "chw" else pixels


def _upright(frame: NDArray[np.uint8], camera: Camera) -> NDArray[np.uint8]:
    """[H, W, 3], whatever the robot's layout."""
    return frame.transpose(1, 2, 0) if camera.layout == "chw" else frame


def _read_numbers(key: str, text: str) -> NDArray[np.floating[Any]]:
    try:
        if text.endswith(".npy"):
            return np.load(text, allow_pickle=False)
        return np.array([float(number) for number in text.split(",")])
    except (OSError, ValueError) as error:
        raise ValueError(f"--state {key}={text}: {error}") from error


def chunk_table(actions: NDArray[np.floating[Any]]) -> str:
    """A chunk [H, A] as text: every step where there are few, else some at even distances, always first and last."""
    horizon, dims = actions.shape
    steps = sorted({round(i) for i in np.linspace(0, horizon - 1, min(horizon, 12))})
    return table(
        ["step", *(f"a{d}" for d in range(dims))], [[str(s), *(f"{v:.4f}" for v in actions[s])] for s in steps]
    )

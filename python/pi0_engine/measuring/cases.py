"""Parity cases: recorded inputs and openpi's own output in one ``.npz`` (the schema is in docs/parity.md)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0_engine.config import CAMERA_SLOTS, GemmaConfig, Pi0Config, SiglipConfig, SolverName
from pi0_engine.engine.arrays import as_tensor
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.inputs import ModelInputs
from pi0_engine.reference.model import Pi0Reference


@dataclass(frozen=True)
class Case:
    """One recorded inference.

    Attributes:
        inputs, noise: what went in; noise float32 [B, H, action_dim].
        num_steps: Euler steps.
        actions: float32 [B, H, action_dim], what came out.
        config: the model's sizes, where the file records them.
    """

    name: str
    inputs: ModelInputs
    noise: Tensor
    num_steps: int
    actions: Tensor
    config: Pi0Config | None


@dataclass(frozen=True)
class Difference:
    """How far actions are from the expected ones. ``rel_l2`` is ||a - b|| / ||b||."""

    rel_l2: float
    max_abs: float
    cosine: float

    @classmethod
    def between(cls, actual: Tensor, expected: Tensor) -> Difference:
        """Compare two arrays of the same shape, in float64."""
        a, b = actual.double().flatten(), expected.double().flatten()
        norms = float(a.norm()) * float(b.norm())
        return cls(
            rel_l2=float((a - b).norm() / b.norm()),
            max_abs=float((a - b).abs().max()),
            cosine=float(a @ b) / norms if norms else float("nan"),
        )


def load_case(path: str | Path) -> Case:
    """Read a case.

    A variant ``NAME__VARIANT.npz`` holds other outputs for the inputs of ``NAME.npz`` beside it.

    Raises:
        ValueError: a file that is not an ``.npz`` case, naming the arrays it lacks.
    """
    path = Path(path)
    arrays = _read(path)
    base = path.with_name(path.stem.split("__")[0] + ".npz")
    recorded = arrays
    if base != path and base.is_file():
        recorded = {name: array for name, array in _read(base).items() if name != "out_actions"} | arrays
    cameras = [name.removeprefix("in_image_mask_") for name in recorded if name.startswith("in_image_mask_")]
    cameras.sort(key=lambda c: (CAMERA_SLOTS.index(c) if c in CAMERA_SLOTS else len(CAMERA_SLOTS), c))
    needed = ["in_tokens", "in_token_mask", "in_state", "in_noise", "in_num_steps", "out_actions"]
    needed += [f"in_image_{camera}" for camera in cameras or CAMERA_SLOTS]
    missing = [name for name in needed if name not in recorded]
    if missing:
        hint = "" if base == path else f" (looked in {base.name} as well)"
        raise ValueError(f"{path} is not a parity case: it has no {', '.join(missing)}{hint}")
    images = np.stack([recorded[f"in_image_{camera}"] for camera in cameras], axis=1)
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images are {images.dtype}, expected uint8 [B, S, S, 3]")
    masks = np.stack([recorded[f"in_image_mask_{camera}"] for camera in cameras], axis=1)
    inputs = ModelInputs(
        images=images.astype(np.float32) / np.float32(255) * 2 - 1,
        image_masks=masks,
        tokens=recorded["in_tokens"].astype(np.int64),
        token_mask=recorded["in_token_mask"],
        state=recorded["in_state"].astype(np.float32),
    )
    return Case(
        name=path.stem,
        inputs=inputs,
        noise=torch.from_numpy(recorded["in_noise"]),
        num_steps=int(recorded["in_num_steps"]),
        actions=torch.from_numpy(recorded["out_actions"]),
        config=_recorded_config(recorded),
    )


def sample_reference(
    model: Pi0Reference, inputs: ModelInputs, noise: Tensor, num_steps: int, solver: SolverName = "euler"
) -> Tensor:
    """The reference's actions float32 [B, H, action_dim] on the CPU, for noise of that shape, on the model's device.

    Frames are resized first.
    """
    device = model.projector.weight.device
    inputs = inputs.resized(FramePreprocessor(size=model.config.vision.image_size))
    arrays = (inputs.pixels, inputs.image_masks, inputs.tokens, inputs.token_mask, inputs.state)
    images, image_masks, tokens, token_mask, state = (as_tensor(array).to(device) for array in arrays)
    return model.sample_actions(
        images, image_masks, tokens, token_mask, state, noise.to(device), num_steps, solver
    ).cpu()


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise ValueError(f"there is no case file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz file: {error}") from error


def _recorded_config(arrays: Mapping[str, np.ndarray]) -> Pi0Config | None:
    """The ``meta`` entry's sizes (it names vision sizes as Hugging Face does)."""
    if "meta" not in arrays:
        return None
    meta: dict[str, Any] = json.loads(str(arrays["meta"]))
    if not {"model", "vision", "llm", "expert", "vocab"} <= meta.keys():
        return None
    vision = meta["vision"]
    return Pi0Config(
        model_type=meta["model"],
        vision=SiglipConfig(
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_dim=vision["intermediate_size"],
            patch_size=meta["patch"],
            image_size=meta["image"],
        ),
        llm=GemmaConfig(**meta["llm"], vocab_size=meta["vocab"]),
        expert=GemmaConfig(**meta["expert"]),
        action_dim=meta["action_dim"],
        max_token_len=meta["max_token_len"],
        action_horizon=meta["action_horizon"],
    )

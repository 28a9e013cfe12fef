"""openpi's recorded outputs, with the inputs and weights they belong to. For tests to import.

``data/golden/expected.npz`` holds what openpi computed (commit 15a9616a; actions, and the velocity of every flow
step). Inputs are regenerated from names, as the recording did it; ``cases.json`` has the CRC-32 of the recorded ones.
Weights are ``RandomCheckpoint(config, seed=0)``. Two cases are also kept whole, as ``pi0-engine verify`` reads them.

A generator is numpy's PCG64 seeded with the CRC-32 of a name. The name of a case is ``pi0/c00_base`` for
``pi0_tiny_c00_base`` and ``full/pi0/f00_cam3_masked`` for ``pi0_full_f00_cam3_masked``.
"""

from __future__ import annotations

import functools
import json
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0_engine.config import CAMERA_SLOTS, Pi0Config
from pi0_engine.engine.runtime import Engine
from pi0_engine.inputs import ModelInputs
from pi0_engine.measuring.cases import Case
from tests.support.models import rel_l2
from tests.support.paths import DATA

GOLDEN = DATA / "golden"
RECORDED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
TINY = [name for name in RECORDED if "_tiny_" in name]
FULL_SIZE = [name for name in RECORDED if "_full_" in name]
#: Cases whose inputs and outputs are kept whole.
WHOLE = ["pi0_tiny_c09_only_cam1_h10_s4", "pi05_tiny_p02_prompt5_steps5"]
#: Cases of which openpi's intermediate results were recorded as well.
STAGES = ["pi0_tiny_c00_base", "pi05_tiny_p00_base"]


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def image(name: str, row: int, size: int = 224) -> np.ndarray:
    """uint8 [size, size, 3]: per channel four plane waves of random direction and phase, with noise on top."""
    random = generator(f"image/{name}/{row}")
    y, x = np.mgrid[:size, :size]
    frame = np.zeros((size, size, 3))
    for channel in range(3):
        for _ in range(4):
            waves_y, waves_x = random.uniform(-6, 6), random.uniform(-6, 6)
            phase, amplitude = random.uniform(0, 2 * np.pi), random.uniform(0.2, 0.6)
            frame[..., channel] += amplitude * np.sin(2 * np.pi * (waves_y * y + waves_x * x) / size + phase)
    frame += 0.25 * random.standard_normal(frame.shape)
    return np.clip(np.round((frame * 0.5 + 0.5) * 255), 0, 255).astype(np.uint8)


def tokens(name: str, row: int, length: int, capacity: int, vocab_size: int) -> np.ndarray:
    """int32 [capacity]: beginning-of-sentence (2), ``length - 1`` random tokens, then padding (0)."""
    ids = np.zeros(capacity, np.int32)
    ids[0] = 2
    ids[1:length] = generator(f"tokens/{name}/{row}").integers(3, vocab_size, length - 1)
    return ids


def normal(name: str, *shape: int) -> np.ndarray:
    return generator(name).standard_normal(shape, dtype=np.float32)


def config_of(case: str) -> Pi0Config:
    model, size = case.split("_")[:2]
    return Pi0Config.load(model if size == "full" else GOLDEN / f"{model}_tiny.json")


@functools.cache
def arrays(case: str) -> dict[str, np.ndarray]:
    """The case in the schema of docs/parity.md, ready for ``np.savez``: ``in_*`` and ``out_actions``."""
    recorded, config = RECORDED[case], config_of(case)
    model, size, rest = case.split("_", 2)
    name = f"{model}/{rest}" if size == "tiny" else f"full/{model}/{rest}"
    lengths, masks = recorded["prompt_lengths"], np.array(recorded["cameras"])
    vocab_size, capacity, batch = config.llm.vocab_size, config.token_capacity, len(lengths)
    assert vocab_size is not None
    out: dict[str, np.ndarray] = {}
    for slot, camera in enumerate(CAMERA_SLOTS):
        out[f"in_image_{camera}"] = np.stack([image(f"{name}/{camera}", row) for row in range(batch)])
        out[f"in_image_mask_{camera}"] = masks[:, slot]
    out["in_tokens"] = np.stack([tokens(name, row, n, capacity, vocab_size) for row, n in enumerate(lengths)])
    out["in_token_mask"] = np.arange(capacity) < np.array(lengths)[:, None]
    out["in_state"] = normal(f"state/{name}", batch, config.action_dim) * np.float32(0.5)
    out["in_noise"] = normal(f"noise/{name}", batch, recorded["horizon"], config.action_dim)
    out["in_num_steps"] = np.array(recorded["num_steps"], np.int32)
    out["out_actions"] = expected(case).numpy()
    return out


def load(case: str) -> Case:
    """The case as :func:`pi0_engine.measuring.cases.load_case` would read it, images scaled to [-1, 1]."""
    a = arrays(case)
    images = np.stack([a[f"in_image_{camera}"] for camera in CAMERA_SLOTS], axis=1)
    masks = np.stack([a[f"in_image_mask_{camera}"] for camera in CAMERA_SLOTS], axis=1)
    inputs = ModelInputs(
        images=images.astype(np.float32) / 255 * 2 - 1,
        image_masks=masks,
        tokens=a["in_tokens"].astype(np.int64),
        token_mask=a["in_token_mask"],
        state=a["in_state"],
    )
    noise, num_steps = torch.from_numpy(a["in_noise"]), int(a["in_num_steps"])
    return Case(case, inputs, noise, num_steps, expected(case), config_of(case))


@functools.cache
def _outputs() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as archive:
        return dict(archive)


def expected(case: str, what: str = "actions") -> Tensor:
    """float32 as openpi computed it: "actions" [B, H, A], "velocities" [steps, B, H, A], "actions__VARIANT".

    Variants: ``jax_float32``, ``jax_bfloat16``; ``bf16_ropefix`` (bfloat16 mode, exact RoPE frequencies);
    ``bf16w_f32compute`` (parameters of the towers rounded to bfloat16, float32 arithmetic); ``bf16file_ropefix`` and
    ``bf16file_f32compute`` (the same, but every parameter rounded, as openpi's converter stores them).
    """
    return torch.from_numpy(_outputs()[f"{case}/{what}"])


def stages(case: str) -> dict[str, Tensor]:
    """openpi's intermediate results; of the prefix every sixth image token and the whole prompt (``prefix_rows``)."""
    with np.load(GOLDEN / f"stages_{case}.npz") as archive:
        return {name: torch.from_numpy(array) for name, array in archive.items()}


#: Error of openpi's bfloat16 mode with exact RoPE against its float32 actions, which is the most that ours may have.
OPENPI = {"pi0_tiny": 0.0087, "pi05_tiny": 0.0053, "pi0_full": 0.0094, "pi05_full": 0.0089}


def error(running: Engine, case: Case) -> float:
    actions = running.infer(case.inputs, case.noise[:, None], num_steps=case.num_steps).actions[:, 0]
    return rel_l2(actions, case.actions)


def openpis_error(case: str) -> float:
    return OPENPI["_".join(case.split("_")[:2])]

"""Checkpoints for the closed loop: the one that is shipped, and one of random weights in its form."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi0_engine.demo.model import CONFIG, initialized, save_checkpoint
from pi0_engine.demo.tokens import CHECKPOINT

needs_trained = pytest.mark.skipif(
    not (CHECKPOINT / "model.safetensors").is_file(), reason=f"there are no trained weights in {CHECKPOINT}"
)


def write_untrained(folder: Path) -> Path:
    """Random weights, and statistics like those of the demonstrations."""

    def statistics(mean: list[float], std: list[float]) -> dict[str, list[float]]:
        q01, q99 = ([m + sign * 2 * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        return {"mean": mean, "std": std, "q01": q01, "q99": q99}

    state = statistics([0.0, 0.65, 0.15, 0.8], [0.1, 0.1, 0.07, 0.3])
    actions = statistics([0.0, 0.2, -0.1, 0.0], [0.6, 0.6, 0.6, 0.6])
    save_checkpoint(folder, initialized(CONFIG, seed=0).eval(), state, actions)
    return folder

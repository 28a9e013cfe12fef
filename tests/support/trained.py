"""A checkpoint for the closed loop with random weights in the form of the shipped one."""

from __future__ import annotations

from pathlib import Path

from pi0_engine.demo.make_tokenizer import make_tokenizer
from pi0_engine.demo.model import CONFIG, initialized, save_checkpoint


def write_untrained(folder: Path) -> Path:
    """Random weights, and statistics like those of the demonstrations."""

    def statistics(mean: list[float], std: list[float]) -> dict[str, list[float]]:
        q01, q99 = ([m + sign * 2 * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        return {"mean": mean, "std": std, "q01": q01, "q99": q99}

    state = statistics([0.0, 0.65, 0.15, 0.8], [0.1, 0.1, 0.07, 0.3])
    actions = statistics([0.0, 0.2, -0.1, 0.0], [0.6, 0.6, 0.6, 0.6])
    save_checkpoint(folder, initialized(CONFIG, seed=0).eval(), state, actions, make_tokenizer())
    return folder

"""Trains the demo's π0 from demonstrations: ``python -m pi0_engine.demo.train DEMONSTRATIONS OUTPUT``.

Two stages, as in the π0 paper: pre-training on everything, where most actions are noisy, then post-training on the
clean demonstrations alone. A run that was stopped goes on where it was saved last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from pi0_engine.demo.batches import Batches
from pi0_engine.demo.make_tokenizer import make_tokenizer
from pi0_engine.demo.model import CONFIG, initialized, save_checkpoint
from pi0_engine.demo.objective import flow_matching_loss
from pi0_engine.demo.training_state import TrainingState
from pi0_engine.measuring.plots import new_figure, require_matplotlib
from pi0_engine.reference.model import sample_training_time

#: Steps between two lines of the log.
_LOG_EVERY = 20
#: What a run goes on from.
_STATE = "state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        steps, post_steps: of pre- and post-training.
        batch: observations per step.
        draws: noises per observation.
        rate, last_rate: AdamW's step size: rises for ``warm_up`` steps, then falls along a cosine.
        average: weight of the past in the averaged parameters, which are what is saved.
        seed: of everything that is drawn.
    """

    steps: int = 5500
    post_steps: int = 2000
    batch: int = 64
    draws: int = 4
    rate: float = 1e-3
    last_rate: float = 2e-5
    warm_up: int = 200
    average: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "draws", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def total(self) -> int:
        return self.steps + self.post_steps

    def rate_at(self, step: int) -> float:
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(self.total - self.warm_up, 1)
        return self.last_rate + (self.rate - self.last_rate) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(
    demonstrations: Path,
    output: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    compiled: bool = False,
    save_every_s: float = 300.0,
    progress: bool = True,
) -> None:
    """Train, or go on training, and write a checkpoint into ``output``.

    Args:
        demonstrations: what ``pi0_engine.demo.collect`` wrote.
        output: ``checkpoint/`` in openpi's PyTorch layout, ``state.safetensors`` and ``tokenizer.model`` to
            resume from, ``loss.jsonl`` and ``loss.png``.
        compiled: run through ``torch.compile``, which needs a C++ compiler and a minute.
        save_every_s: seconds between two savings.

    Raises:
        ValueError: no demonstrations, or a saved run with another recipe or without its tokenizer; no matplotlib.
    """
    require_matplotlib()
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(output)
    batches = Batches(demonstrations, CONFIG, tokenizer)
    model = initialized(CONFIG, recipe.seed).to(device)
    state = TrainingState.resume(output / _STATE, model, recipe)
    log = _open_log(output / "loss.jsonl", state.step)
    step_loss = torch.compile(_loss) if compiled else _loss

    def save() -> None:
        state.save()
        averaged = state.averaged()
        save_checkpoint(output / "checkpoint", averaged, batches.state, batches.actions, tokenizer.read_bytes())

    saved = time.monotonic()
    with tqdm(total=recipe.total, initial=state.step, unit="step", disable=not progress) as bar:
        while state.step < recipe.total:
            clean = state.step >= recipe.steps
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.step)
            batch = batches.draw(recipe.batch, generator, clean=clean, device=device)
            noise = torch.randn(
                recipe.batch, recipe.draws, CONFIG.action_horizon, CONFIG.action_dim, generator=generator
            )
            times = sample_training_time(recipe.batch * recipe.draws, generator).view(recipe.batch, recipe.draws)
            with torch.autocast(device, torch.bfloat16):
                loss = step_loss(model, batch, noise.to(device), times.to(device))
            loss.backward()
            state.update(recipe.rate_at(state.step), recipe.average)
            bar.update()
            if state.step % _LOG_EVERY == 1:
                value = loss.item()
                bar.set_postfix(loss=f"{value:.3f}", stage="post" if clean else "pre", refresh=False)
                print(json.dumps({"step": state.step, "loss": value, "clean": clean}), file=log, flush=True)
            if time.monotonic() - saved > save_every_s:
                save()
                saved = time.monotonic()
    save()  # of a run that was stopped between its last state and its checkpoint, too
    log.close()
    plot_loss(output / "loss.jsonl", output / "loss.png")


def _tokenizer(run: Path) -> Path:
    """The run's own: made from the instructions where it begins, and kept, whatever becomes of the instructions."""
    file = run / "tokenizer.model"
    if not (run / _STATE).is_file():
        file.write_bytes(make_tokenizer())
    elif not file.is_file():
        raise ValueError(f"{run} has a {_STATE} and no {file.name}, expected the one that the run began with beside it")
    return file


def _open_log(path: Path, step: int) -> TextIO:
    """For appending; what was written after the last saving is done again, and goes."""
    lines = path.read_text().splitlines() if path.is_file() else []
    path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
    return path.open("a")


def _loss(model: Any, batch: Any, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    return flow_matching_loss(model, batch, noise, times)


def plot_loss(log: Path, picture: Path) -> None:
    """The loss of each twentieth step and its running mean, with the beginning of post-training marked."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    means, mean = [], losses[0]
    for loss in losses:
        mean = 0.97 * mean + 0.03 * loss
        means.append(mean)
    figure = new_figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, losses, lw=0.5, color="tab:blue", alpha=0.4, label="of one step")
    axes.plot(steps, means, color="tab:blue", label="running mean")
    clean = [row["step"] for row in rows if row["clean"]]
    if clean:
        axes.axvline(clean[0], color="gray", ls="--", label="post-training begins")
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pi0_engine.demo.train", description=__doc__)
    parser.add_argument("demonstrations", type=Path, help="what python -m pi0_engine.demo.collect wrote")
    parser.add_argument("output", type=Path, help="folder of this run; one that exists is continued")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help=f"of pre-training (default {Recipe.steps})")
    parser.add_argument(
        "--post-steps", type=int, default=Recipe.post_steps, help=f"of post-training (default {Recipe.post_steps})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    given = parser.parse_args(arguments)
    try:
        recipe = Recipe(steps=given.steps, post_steps=given.post_steps, seed=given.seed)
        train(given.demonstrations, given.output, recipe, device=given.device, compiled=given.compile)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

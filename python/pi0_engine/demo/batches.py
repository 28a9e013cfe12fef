"""Demonstrations of all tasks as training batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.demo.dataset import Demonstrations
from pi0_engine.demo.model import normalizer
from pi0_engine.demo.objective import Batch
from pi0_engine.demo.tasks import TASKS
from pi0_engine.text.tokenizer import load_tokenizer


class Batches:
    """Draws observations: every task as often as its share says.

    Args:
        folder: what ``pi0_engine.demo.collect`` wrote.
        config: the model.
        tokenizer: the sentencepiece model that the checkpoint will have.

    Attributes:
        state, actions: statistics over all demonstrations, as ``norm_stats.json`` has them.

    Raises:
        ValueError: no demonstrations there, or none of one of the two styles.
    """

    def __init__(self, folder: Path, config: Pi0Config, tokenizer: Path) -> None:
        self._config = config
        self._parts: dict[str, list[tuple[str, Demonstrations]]] = {"clean": [], "noisy": []}
        for path in sorted(folder.glob("*.safetensors")):
            task, _, style = path.stem.rpartition("-")
            if task in TASKS and style in self._parts:
                self._parts[style].append((task, Demonstrations.load(path)))
        for style, parts in self._parts.items():
            if not parts:
                raise ValueError(f"{folder} holds no {style} demonstrations: run python -m pi0_engine.demo.collect")
        every = [part for parts in self._parts.values() for _, part in parts]
        self.state = _statistics(np.concatenate([part.states for part in every]))
        self.actions = _statistics(np.concatenate([part.actions for part in every]))
        self._state, self._actions = normalizer(self.state), normalizer(self.actions)
        self._tokenizer = load_tokenizer(tokenizer, config)

    def draw(self, size: int, generator: torch.Generator, *, clean: bool, device: str = "cpu") -> Batch:
        """``size`` observations, of the clean demonstrations alone or of all."""
        parts = self._parts["clean"] if clean else self._parts["clean"] + self._parts["noisy"]
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        frames, states, chunks, valid, tokens = [], [], [], [], []
        shares = np.array([TASKS[task].share for task, _ in parts], dtype=np.float64)
        for number in rng.choice(len(parts), size=size, p=shares / shares.sum()):
            task, part = parts[number]
            index = rng.integers(len(part), size=1)
            chunk, there = part.chunks(index, self._config.action_horizon)
            frames.append(part.frames[index[0]])
            states.append(part.states[index[0]])
            chunks.append(chunk[0])
            valid.append(there[0])
            tokens.append(self._tokenizer.encode_prompt(str(rng.choice(TASKS[task].prompts))))
        pixels = torch.from_numpy(np.stack(frames)).to(device)
        return Batch(
            images=pixels.float() / 255.0 * 2.0 - 1.0,
            image_masks=torch.ones(pixels.shape[:2], dtype=torch.bool, device=device),
            tokens=torch.from_numpy(np.stack([ids for ids, _ in tokens])).to(device),
            token_mask=torch.from_numpy(np.stack([mask for _, mask in tokens])).to(device),
            state=self._padded(self._state.normalize(np.stack(states))).to(device),
            actions=self._padded(self._actions.normalize(np.stack(chunks))).to(device),
            valid=torch.from_numpy(np.stack(valid)).to(device),
        )

    def _padded(self, values: NDArray[np.floating]) -> torch.Tensor:
        out = np.zeros((*values.shape[:-1], self._config.action_dim), np.float32)
        out[..., : values.shape[-1]] = values
        return torch.from_numpy(out)


def _statistics(values: NDArray[np.float32]) -> dict[str, list[float]]:
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    rows = {"mean": values.mean(axis=0, dtype=np.float64), "std": values.std(axis=0, dtype=np.float64)}
    return {name: [float(x) for x in row] for name, row in {**rows, "q01": low, "q99": high}.items()}

"""Demonstrations on disk and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes of one task, one behind the other: N observations and the M actions that follow them.

    Attributes:
        frames: uint8 [N, cameras, size, size, 3], in the order of :data:`pi0_engine.demo.scene.CAMERAS`.
        states: float32 [N, 4], in robot units.
        actions: float32 [M, 4], the expert's.
        first: int64 [N], the index of the action that belongs to an observation.
        end: int64 [N], behind the last action that may be in a chunk with it.
    """

    frames: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    first: NDArray[np.int64]
    end: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def join(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        """One behind the other."""
        before = np.cumsum([0, *(len(part.actions) for part in parts)])
        joined: dict[str, NDArray[Any]] = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        }
        shift = np.repeat(before[:-1], [len(part) for part in parts])
        joined["first"], joined["end"] = joined["first"] + shift, joined["end"] + shift
        return cls(**joined)

    def save(self, path: Path) -> None:
        save_file({field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Raises ValueError for a file that is missing or was not written by :meth:`save`."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"{path} does not hold demonstrations: {error}") from error

    def chunks(self, index: NDArray[np.int64], horizon: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The actions behind some observations, float32 [B, horizon, 4], and which of them there are, bool
        [B, horizon]: beyond a segment's end its last action is repeated.
        """
        steps = self.first[index, None] + np.arange(horizon)
        last = self.end[index, None] - 1
        return self.actions[np.minimum(steps, last)], steps <= last

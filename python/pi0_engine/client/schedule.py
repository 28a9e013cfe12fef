"""Which action belongs to which control step: no threads, no clock, no policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: Why a chunk was not taken: it was asked for before the last reset; its observation is not newer than that of the
#: chunk in execution; its observation is too old; all of its control steps have gone by.
Discarded = Literal["reset", "superseded", "too_old", "past"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Actions with the stamp of the observation that they answer: ``actions[k]`` is for control step ``tick + k``.

    Attributes:
        actions: float32 [H, A].
        tick: control step in which the observation was taken.
        expires_at: when the observation is too old to act on, in seconds of the control loop's clock.
        epoch: number of resets before it was asked for.
        name: what its source calls it, to continue it later.
    """

    actions: NDArray[np.float32]
    tick: int
    expires_at: float
    epoch: int = 0
    name: Any = None

    def __len__(self) -> int:
        return len(self.actions)


class Schedule:
    """The chunk in execution, and the rules by which the next one takes over.

    Attributes:
        epoch: number of resets.
        chunk: the one in execution, or the last one that was; None before the first of the epoch.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.chunk: Chunk | None = None

    def reset(self) -> None:
        """Begin a new epoch: nothing of the old one will be executed, whenever it arrives."""
        self.epoch += 1
        self.chunk = None

    def offer(self, chunk: Chunk, tick: int, now: float) -> Discarded | None:
        """Let a chunk take over from control step ``tick`` on, or say why not."""
        if chunk.epoch != self.epoch:
            return "reset"
        if self.chunk is not None and chunk.tick <= self.chunk.tick:
            return "superseded"
        if now > chunk.expires_at:
            return "too_old"
        if tick - chunk.tick >= len(chunk):
            return "past"
        self.chunk = chunk
        return None

    def index(self, tick: int, now: float) -> int | None:
        """Which action of ``chunk`` is for control step ``tick``; None if none is left, or its observation too old."""
        if self.chunk is None or now > self.chunk.expires_at:
            return None
        index = tick - self.chunk.tick
        return index if 0 <= index < len(self.chunk) else None

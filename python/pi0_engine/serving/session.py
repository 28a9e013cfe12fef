"""What the server keeps for one connection: nothing of it is shared with another."""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.rtc.schedule import DelayEstimator

#: Replies that may still be continued: the one in execution, and those that came while it was.
_KEPT_CHUNKS = 4


@dataclass(eq=False)
class Episode:
    """From one reset to the next. A reset puts another in its place: an inference that is still running keeps the old
    one, so nothing of it reaches the new.

    Attributes:
        epoch: number of resets before it.
        rng: draws the noise.
        chunks: the last replies, {sequence: float32 [H, A] in robot units}.
    """

    epoch: int
    rng: np.random.Generator
    chunks: OrderedDict[int, NDArray[np.float32]] = field(default_factory=OrderedDict)

    def remember(self, sequence: int, actions: NDArray[np.float32]) -> None:
        self.chunks[sequence] = actions
        while len(self.chunks) > _KEPT_CHUNKS:
            self.chunks.popitem(last=False)


class Session:
    """One client from connection to disconnection.

    Args:
        number: counts sessions; with ``seed`` it determines the noise.
        seed: the server's; None draws from the operating system.
        control_hz: of the robot, to count latencies in control steps; None where it is not declared.

    Attributes:
        name: unlikely to be guessed, for logs and replies.
        episode: the current one.
        sequence: number of the last reply with actions, from 1.
        delay: estimates how many control steps an answer takes; None without ``control_hz``.
        total_ms: receipt to reply of the previous request.
    """

    def __init__(self, number: int, seed: int | None, control_hz: float | None) -> None:
        self.name = secrets.token_hex(8)
        self._entropy = None if seed is None else (seed, number)
        self._sequences = itertools.count(1)
        self.episode = Episode(0, np.random.default_rng(self._entropy))
        self.sequence = 0
        self.delay = None if control_hz is None else DelayEstimator(control_hz)
        self.total_ms: float | None = None

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode. Without a seed the noise goes on where it was."""
        rng = self.episode.rng if seed is None else np.random.default_rng(seed)
        self.episode = Episode(self.episode.epoch + 1, rng)

    def next_sequence(self) -> int:
        self.sequence = next(self._sequences)
        return self.sequence

    def describe(self) -> dict[str, Any]:
        """The key ``session`` of a reply."""
        return {"id": self.name, "epoch": self.episode.epoch, "sequence": self.sequence}

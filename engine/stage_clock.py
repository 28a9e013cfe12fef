"""Wall time of the stages of one inference."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Wall time between laps; waits for the GPU at each, so that a lap is the stage's own time.

    ``wait=False`` leaves the GPU at work: what it has not done yet counts in the next lap.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def lap(self, stage: str, *, wait: bool = True) -> None:
        if wait and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now

"""Who drives: the engine, or the plain PyTorch reference in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.config import EngineConfig, Pi0Config, SolverName
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.measuring.cases import sample_reference
from pi0_engine.policy import Pi0Policy, load_transform
from pi0_engine.reference.model import Pi0Reference
from pi0_engine.robots.transforms import ObservationTransform
from pi0_engine.rtc.schedule import Leftover

ROBOT = "metaworld"


class ReferencePolicy:
    """The reference in float32 on the CPU, behind the same transforms as the engine.

    Args:
        model: the reference.
        transform: between the robot and the network.
        solver: of the flow.
    """

    def __init__(self, model: Pi0Reference, transform: ObservationTransform, solver: SolverName = "euler") -> None:
        self.model, self.transform, self.solver = model, transform, solver

    @property
    def config(self) -> Pi0Config:
        return self.transform.config

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: NDArray[np.float32],
        num_steps: int | None = None,
        leftover: Leftover | None = None,
    ) -> dict[str, Any]:
        """``actions`` float32 [H, A] in robot units, for noise float32 [H, action_dim].

        Raises:
            ValueError: an observation that cannot be used; a leftover, which only the engine continues.
        """
        if leftover is not None:
            raise ValueError(
                "the reference policy was given a leftover, expected none: only the engine continues chunks"
            )
        inputs, context = self.transform.prepare(observation)
        steps = self.config.num_steps if num_steps is None else num_steps
        actions = sample_reference(self.model, inputs, torch.from_numpy(noise)[None], steps, self.solver)
        return {"actions": self.transform.finish(actions.numpy(), context)[0]}


def load_policy(checkpoint: str | Path = CHECKPOINT, engine: EngineConfig | None = None) -> Pi0Policy:
    """The simulated robot's checkpoint on the engine.

    Raises:
        ValueError: no checkpoint, or not this robot's; a device or backend that is not available here.
    """
    return Pi0Policy.from_checkpoint(checkpoint, robot=ROBOT, engine=engine)


def load_reference(checkpoint: str | Path = CHECKPOINT, solver: SolverName = "euler") -> ReferencePolicy:
    """The same checkpoint on the reference, in float32. Raises ValueError as :func:`load_policy` does."""
    opened = open_checkpoint(checkpoint)
    transform = load_transform(opened, ROBOT)
    return ReferencePolicy(Pi0Reference.from_tensors(transform.config, opened.tensor), transform, solver)

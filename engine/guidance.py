"""Real-time chunking inside the flow loop: what an inference takes to continue a chunk (docs/rtc.md).

Either an earlier chunk guides the new one, or the new one's first actions are given.

Guided: the velocity v of a step at time t becomes v - g (previous - (x - t v)), where x - t v is the chunk that the
step foresees, and g = min(w(t), max_weight) * weights. The correction is taken as it is, without the Jacobian of the
network, as lerobot does: it needs no backward pass, and is part of the Euler step's kernel. Only Euler's: the paper and
lerobot bound the pull by the step, and that bound is not one for solvers of second order (docs/solvers.md).

Given: the first actions stay what they are, and the network is told so: their tokens are at flow time 0, where actions
are clean, while the others are at the step's. π0.5's adaRMS modulates each token by its own time then. It works as far
as the checkpoint was trained that way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config, SolverName
from pi0_engine.engine.plan import check_per_token_time


@dataclass(frozen=True)
class Guide:
    """Pull chunks towards earlier ones; all samples of an observation are pulled towards the same.

    Attributes:
        previous: float32 [B, H, action_dim], normalised like the network's actions; element k is of the same control
            step as element k of the new chunk. Zeros where nothing is left.
        weights: float32 [B, H], 0 (no pull) to 1, per control step.
        max_weight: bound of the pull of a flow step.
    """

    previous: Tensor
    weights: Tensor
    max_weight: float

    def validate(self, config: Pi0Config, batch: int, horizon: int, num_steps: int) -> None:
        """Raise ValueError naming what does not fit ``batch`` observations and chunks of ``horizon`` actions."""
        _check("previous", self.previous, (batch, horizon, config.action_dim))
        _check("weights", self.weights, (batch, horizon))
        if not bool(((self.weights >= 0) & (self.weights <= 1)).all()):
            raise ValueError("the continuation's weights are not all between 0 and 1")
        if not 0 < self.max_weight < math.inf:
            raise ValueError(f"the continuation's max_weight is {self.max_weight}, expected a positive number")
        if num_steps == 1 and self.max_weight > 1:
            # x1 + max_weight (previous - x1): no later step would bring it back.
            raise ValueError(
                f"in a single flow step a max_weight of {self.max_weight} would overshoot the earlier chunk as many "
                "times: expected at most 1, or more flow steps"
            )


@dataclass(frozen=True)
class FixedPrefix:
    """Chunks whose first actions are given (π0.5 only); all samples of an observation begin with the same.

    Attributes:
        previous: float32 [B, H, action_dim], normalised; of each observation the first ``rows`` are used.
        rows: how many leading actions of each observation's chunks are given, 0 to H.
    """

    previous: Tensor
    rows: tuple[int, ...]

    def validate(self, config: Pi0Config, batch: int, horizon: int, num_steps: int) -> None:
        """Raise ValueError naming what does not fit ``batch`` observations and chunks of ``horizon`` actions."""
        check_per_token_time(config)
        _check("previous", self.previous, (batch, horizon, config.action_dim))
        if len(self.rows) != batch or not all(isinstance(rows, int) and 0 <= rows <= horizon for rows in self.rows):
            raise ValueError(f"the continuation's rows are {self.rows}, expected {batch} of 0 to {horizon}")

    def given(self) -> Tensor:
        """bool [B, H]: the actions that are given."""
        return torch.arange(self.previous.shape[1]) < torch.tensor(self.rows)[:, None]


Continuation = Guide | FixedPrefix


def check_guidable(solver: SolverName) -> None:
    """Raise ValueError saying why chunks cannot be guided with this solver."""
    if solver != "euler":
        raise ValueError(
            f"guided real-time chunking is defined for Euler's flow steps, and the solver is {solver!r}: use solver "
            "'euler', or rtc mode 'trained' with a checkpoint for it"
        )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        given = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"the continuation's {name} is {given}, expected float32 {list(shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the continuation's {name} contains NaN or infinity")

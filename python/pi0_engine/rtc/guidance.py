"""Real-time chunking as the flow loop does it: what an inference takes to continue a chunk (docs/rtc.md).

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

import numpy as np
from numpy.typing import NDArray

from pi0_engine.config import Pi0Config, SolverName


@dataclass(frozen=True)
class Guide:
    """Pull chunks towards earlier ones; all samples of an observation are pulled towards the same.

    Attributes:
        previous: float32 [B, H, action_dim], normalised like the network's actions; element k is of the same control
            step as element k of the new chunk. Zeros where nothing is left.
        weights: float32 [B, H], 0 (no pull) to 1, per control step.
        max_weight: bound of the pull of a flow step.
    """

    previous: NDArray[np.float32]
    weights: NDArray[np.float32]
    max_weight: float

    def validate(self, config: Pi0Config, batch: int, horizon: int, num_steps: int) -> None:
        """Raise ValueError naming what does not fit ``batch`` observations and chunks of ``horizon`` actions."""
        _check("previous", self.previous, (batch, horizon, config.action_dim))
        _check("weights", self.weights, (batch, horizon))
        if not ((self.weights >= 0) & (self.weights <= 1)).all():
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

    previous: NDArray[np.float32]
    rows: tuple[int, ...]

    def validate(self, config: Pi0Config, batch: int, horizon: int, num_steps: int) -> None:
        """Raise ValueError naming what does not fit ``batch`` observations and chunks of ``horizon`` actions."""
        check_per_token_time(config)
        _check("previous", self.previous, (batch, horizon, config.action_dim))
        if len(self.rows) != batch or not all(isinstance(rows, int) and 0 <= rows <= horizon for rows in self.rows):
            raise ValueError(f"the continuation's rows are {self.rows}, expected {batch} of 0 to {horizon}")

    def given(self) -> NDArray[np.bool_]:
        """bool [B, H]: the actions that are given."""
        given: NDArray[np.bool_] = np.arange(self.previous.shape[1]) < np.array(self.rows)[:, None]
        return given


Continuation = Guide | FixedPrefix


def guidance_weight(time: float) -> float:
    """w(t), how strongly a flow step at ``time`` pulls before it is bounded; infinite at time 1.

    (1 - tau) / tau * ((1 - tau)^2 + tau^2) / (1 - tau)^2 with tau = 1 - time, as in Real-Time Execution of Action
    Chunking Flow Policies, whose time tau runs the other way.
    """
    return (time**2 + (1 - time) ** 2) / (time * (1 - time)) if time < 1 else math.inf


def check_per_token_time(config: Pi0Config) -> None:
    """Raise ValueError saying why the model's action tokens all have the same flow time."""
    if not config.is_pi05:
        raise ValueError(
            "π0 was trained with one flow time for all actions of a chunk, which is part of its action tokens: a given "
            "prefix at time 0 needs a π0.5 checkpoint that was trained with one (the time enters through adaRMS there)"
        )


def check_guidable(solver: SolverName) -> None:
    """Raise ValueError saying why chunks cannot be guided with this solver."""
    if solver != "euler":
        raise ValueError(
            f"guided real-time chunking is defined for Euler's flow steps, and the solver is {solver!r}: use solver "
            "'euler', or rtc mode 'trained' with a checkpoint for it"
        )


def _check(name: str, array: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"the continuation's {name} is of type {type(array).__name__}, expected a numpy array of float32"
        )
    if array.dtype != np.float32 or array.shape != shape:
        given = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"the continuation's {name} is {given}, expected float32 {list(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"the continuation's {name} contains NaN or infinity")

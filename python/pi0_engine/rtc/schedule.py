"""Real-time chunking: a new chunk of actions that continues the one the robot is executing (docs/rtc.md).

While a chunk is computed, the robot goes on with the old one. The new chunk must agree with the actions that will have
been executed by then, and depart from the old plan smoothly behind them. Here is what robot and policy say to each
other about that, and how strongly each step of the old chunk counts; the arithmetic is the engine's.

Black, Galliker, Levine: Real-Time Execution of Action Chunking Flow Policies (2025), guided;
Black, Ren, Equi, Levine: Training-Time Action Conditioning for Efficient Real-Time Chunking (2025), trained.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Mode = Literal["guided", "trained"]
Schedule = Literal["linear", "exp", "ones", "zeros"]


@dataclass(frozen=True)
class RtcConfig:
    """How chunks continue each other.

    Args:
        mode: ``"guided"`` pulls each flow step towards the old chunk and works with any checkpoint; ``"trained"`` gives
            the model the actions that are certain, and is for π0.5 checkpoints trained that way.
        schedule: of the pull between the delay and the execution horizon; see :func:`prefix_weights`. Guided only.
        execution_horizon: steps of the new chunk that are pulled at all. Guided only.
        max_guidance_weight: bound of the pull, which would be infinite in the first flow step. Guided only.

    Raises:
        ValueError: an unknown name, or a number that is not positive.
    """

    mode: Mode = "guided"
    schedule: Schedule = "linear"
    execution_horizon: int = 10
    max_guidance_weight: float = 10.0

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("schedule", Schedule)):
            if getattr(self, name) not in list(get_args(kind)):  # a list: JSON may bring something unhashable
                raise ValueError(f"rtc {name} is {getattr(self, name)!r}, expected one of {list(get_args(kind))}")
        if not _is_count(self.execution_horizon) or self.execution_horizon < 1:
            raise ValueError(f"rtc execution_horizon is {self.execution_horizon!r}, expected an integer of at least 1")
        if not _is_number(self.max_guidance_weight) or not 0 < self.max_guidance_weight < math.inf:
            raise ValueError(f"rtc max_guidance_weight is {self.max_guidance_weight!r}, expected a positive number")


@dataclass(frozen=True, eq=False)
class Leftover:
    """What is left of the chunk in execution, seen from the moment of the observation.

    Attributes:
        actions: float [L, robot.action_dim] in robot units, absolute, as ``Pi0Policy.infer`` returned them: the actions
            that had not been executed when the observation was taken, in order. L may be 0.
        delay: how many of them will be executed before the new chunk is there.

    Raises:
        ValueError: actions of another shape or not finite, or a delay that is not an integer of at least 0.
    """

    actions: NDArray[Any]
    delay: int

    def __post_init__(self) -> None:
        values = np.asarray(self.actions)
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise ValueError(
                f"leftover actions are {values.dtype} {list(values.shape)}, expected float [L, action_dim]"
            )
        if not np.isfinite(values).all():
            raise ValueError("leftover actions contain NaN or infinity")
        if not _is_count(self.delay) or self.delay < 0:
            raise ValueError(f"leftover delay is {self.delay!r}, expected an integer of at least 0")
        object.__setattr__(self, "actions", values)
        object.__setattr__(self, "delay", int(self.delay))

    def __len__(self) -> int:
        return int(self.actions.shape[0])


def prefix_weights(schedule: Schedule, delay: int, execution_horizon: int, horizon: int) -> NDArray[np.float32]:
    """How strongly each step of a new chunk is pulled towards the old one: float32 [horizon], 1 down to 0.

    1 before ``delay``, 0 from ``execution_horizon`` on. Between them (m steps, k = 1..m): ``"linear"`` 1 - k / (m + 1);
    ``"exp"`` the same u as u (e^u - 1) / (e - 1); ``"ones"`` 1; ``"zeros"`` 0. A delay beyond the execution horizon
    counts as that horizon. Equal to lerobot's ``RTCProcessor.get_prefix_weights``.

    Raises:
        ValueError: an unknown schedule, or a length that is not an integer of at least 0.
    """
    if schedule not in list(get_args(Schedule)):
        raise ValueError(f"schedule is {schedule!r}, expected one of {list(get_args(Schedule))}")
    for name, value in (("delay", delay), ("execution_horizon", execution_horizon), ("horizon", horizon)):
        if not _is_count(value) or value < 0:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 0")
    end = min(execution_horizon, horizon)
    start = min(delay, end)
    weights = np.zeros(horizon)
    weights[:start] = 1.0
    between = np.linspace(1.0, 0.0, end - start + 2)[1:-1]
    if schedule == "linear":
        weights[start:end] = between
    elif schedule == "exp":
        weights[start:end] = between * np.expm1(between) / (math.e - 1)
    elif schedule == "ones":
        weights[start:end] = 1.0
    return weights.astype(np.float32)


class DelayEstimator:
    """How many actions a robot executes while a chunk is computed, from the latencies that were measured.

    The largest of the last ``window`` latencies counts: a chunk that comes too late is a seam that nothing smooths.
    The first ``warm_up`` ones do not: compiling and capturing happen once, and would pass for the delay of a long time.

    Args:
        control_hz: actions that the robot executes per second.
        window: latencies that count.
        warm_up: latencies that are left out at the beginning.

    Raises:
        ValueError: a rate or a window that is not positive, or a negative warm-up.
    """

    def __init__(self, control_hz: float, window: int = 20, *, warm_up: int = 1) -> None:
        if not _is_number(control_hz) or not 0 < control_hz < math.inf:
            raise ValueError(f"control_hz is {control_hz!r}, expected a positive number")
        if not _is_count(window) or window < 1:
            raise ValueError(f"window is {window!r}, expected an integer of at least 1")
        if not _is_count(warm_up) or warm_up < 0:
            raise ValueError(f"warm_up is {warm_up!r}, expected an integer of at least 0")
        self.control_hz = float(control_hz)
        self._left_out = warm_up
        self._latencies: deque[float] = deque(maxlen=window)

    def add(self, latency_s: float) -> None:
        """Take a latency in seconds, from the observation to the moment when its actions can be executed.

        Raises:
            ValueError: one that is negative or not finite.
        """
        if not _is_number(latency_s) or not 0 <= latency_s < math.inf:
            raise ValueError(f"latency is {latency_s!r} seconds, expected a finite number of at least 0")
        if self._left_out:
            self._left_out -= 1
        else:
            self._latencies.append(float(latency_s))

    def delay(self) -> int:
        """ceil(largest latency * control_hz) in steps; 0 until the first latency that counts."""
        # Less a billionth of a step: 0.07 s at 100 Hz are 7 steps, in floating point a little more.
        return math.ceil(max(self._latencies, default=0.0) * self.control_hz - 1e-9)


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)

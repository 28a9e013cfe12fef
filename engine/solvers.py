"""Flow solvers: when the network is called, and what becomes of the velocity that it answers (docs/solvers.md).

The flow is the ODE dx/dt = v(x, t) from t = 1 (noise) to t = 0 (actions), in equal steps of h = -1 / num_steps.
x_n is the chunk at the time t_n = 1 + n h, and v_n the network's velocity there.

- ``euler``, what π0 is trained and published with, order 1: x_{n+1} = x_n + h v_n.
- ``midpoint``, Runge's method of order 2 in two calls: x_{n+1} = x_n + h v(x_n + h / 2 v_n, t_n + h / 2).
- ``adams_bashforth``, the explicit Adams method of order 2 in one call: x_{n+1} = x_n + h (3/2 v_n - 1/2 v_{n-1}). Its
  first step is Euler's: an error of O(h^2) once does not change the order, and steps and calls stay the same number.

Hairer, Nørsett, Wanner: Solving Ordinary Differential Equations I, sections II.1 (Runge) and III.1 (Adams).

Both of order 2 run as one op. Beside ``actions``, the point at which the network is called, there is a point ``base``.
Each call moves both from where base was (in the first call, where actions are: the noise), by multiples of y = h v:

    midpoint          base is x_n: the first call of a step moves actions by 1/2 and base by 0, the second both by 1
    adams_bashforth   base is x_n - h / 2 v_{n-1}: actions move by 3/2 and base by 1 (in the first step by 1 and 1/2)

So no velocity has to be kept, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi0_engine.config import FlowTimes, SolverName

#: Network calls per flow step. What runs is :func:`network_calls`; this is for whoever counts.
CALLS_PER_STEP: dict[SolverName, int] = {"euler": 1, "midpoint": 2, "adams_bashforth": 1}


@dataclass(frozen=True)
class Advance:
    """How far a call moves ``base`` and ``actions`` from where base was, in multiples of y = dt times the velocity."""

    base: float
    actions: float


@dataclass(frozen=True)
class NetworkCall:
    """One evaluation of the velocity: at which flow time, and what follows. ``advance`` is None in an Euler step."""

    time: float
    advance: Advance | None = None


def flow_grid(num_steps: int, rounding: FlowTimes = "openpi") -> tuple[list[float], float]:
    """Times at which flow steps begin, 1 down to about 1/num_steps, and dt.

    Accumulated in float32 like openpi's, or each rounded once like lerobot's. At a period of 4e-3 the difference of
    1e-7 turns the time embedding by 1e-4.
    """
    dt, time, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    if rounding == "lerobot":
        return [float(np.float32(1.0 + step * (-1.0 / num_steps))) for step in range(num_steps)], float(dt)
    for _ in range(num_steps):
        times.append(float(time))
        time += dt
    return times, float(dt)


def network_calls(
    solver: SolverName, num_steps: int, rounding: FlowTimes = "openpi"
) -> tuple[tuple[NetworkCall, ...], float]:
    """The calls of ``num_steps`` flow steps, in order, and dt."""
    times, dt = flow_grid(num_steps, rounding)
    if solver == "euler":
        return tuple(NetworkCall(time) for time in times), dt
    if solver == "adams_bashforth":
        ways = [Advance(0.5, 1.0), *[Advance(1.0, 1.5)] * (num_steps - 1)]
        return tuple(NetworkCall(time, way) for time, way in zip(times, ways, strict=True)), dt
    halves = _half_times(times, num_steps, rounding)
    pairs = zip(times, halves, strict=True)
    there, back = Advance(0.0, 0.5), Advance(1.0, 1.0)
    return tuple(call for t, half in pairs for call in (NetworkCall(t, there), NetworkCall(half, back))), dt


def _half_times(times: list[float], num_steps: int, rounding: FlowTimes) -> list[float]:
    """The middle of each step, rounded as the steps' own times are."""
    if rounding == "lerobot":
        return [float(np.float32(1.0 + (step + 0.5) * (-1.0 / num_steps))) for step in range(num_steps)]
    half = np.float32(-1.0 / num_steps) / np.float32(2)
    return [float(np.float32(time) + half) for time in times]

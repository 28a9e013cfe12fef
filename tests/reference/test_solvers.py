"""The reference's solvers: their order on an ODE with a known solution and on small models, and their steps by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pi0_engine.config import ModelType, SolverName
from pi0_engine.reference.model import flow_times, integrate
from tests.support.models import (
    MODEL_TYPES,
    SECOND_ORDER,
    random_inputs,
    random_noise,
    reference,
    reference_actions,
    rel_l2,
    small_config,
    smooth_in_time,
)

#: By what halving the step divides the error.
GAIN: dict[SolverName, float] = {"euler": 2.0, "midpoint": 4.0, "adams_bashforth": 4.0}
SOLVERS = list(GAIN)


def gains(errors: list[float]) -> list[float]:
    return [coarse / fine for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_orders_on_an_ode_with_a_known_solution(solver: SolverName) -> None:
    """dx/dt = 2 t x^2, so 1 / x(0) = 1 / x(1) + 1. In float64; times and steps are powers of two, so exact."""
    start = torch.tensor([1.0, 3.0], dtype=torch.float64)
    exact = 1 / (1 / start + 1)
    errors = [
        rel_l2(integrate(lambda x, t: 2 * t.double() * x**2, start, n, solver), exact) for n in (64, 128, 256, 512)
    ]
    assert all(gain == pytest.approx(GAIN[solver], rel=0.1) for gain in gains(errors)), errors


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_a_velocity_linear_in_time_takes_one_step_of_second_order_each(solver: SolverName) -> None:
    """dx/dt = 2 t - 1 ends where it began. Euler's first step costs Adams-Bashforth h^2, once."""
    for n in (1, 2, 8):
        end = integrate(lambda x, t: 2 * t.double() - 1 + 0 * x, torch.zeros(1, dtype=torch.float64), n, solver)
        assert float(end) == pytest.approx(0.0 if solver == "midpoint" else -1 / n**2, abs=1e-12)


def test_three_steps_by_hand() -> None:
    """Which velocities are asked for, and how they are added up."""
    calls: list[tuple[float, float]] = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        calls.append((float(x), float(time)))
        return torch.tensor([[1.0, 10.0, 100.0, 1000.0][len(calls) - 1]])

    h = -0.5
    assert float(integrate(velocity, torch.zeros(1), 2, "euler")) == h * 11
    assert calls == [(0.0, 1.0), (h, 0.5)]
    calls.clear()
    assert float(integrate(velocity, torch.zeros(1), 2, "midpoint")) == h * 1010
    assert calls == [(0.0, 1.0), (h / 2, 0.75), (h * 10, 0.5), (h * 10 + h / 2 * 100, 0.25)]
    calls.clear()
    assert float(integrate(velocity, torch.zeros(1), 3, "adams_bashforth")) == pytest.approx(
        -1 / 3 * (1 + (15 - 0.5) + (150 - 5))
    )
    assert [time for _, time in calls] == [float(time) for time, _ in flow_times(3)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_orders_on_a_small_model(model_type: ModelType, solver: SolverName) -> None:
    model = smooth_in_time(model_type)
    inputs, noise = random_inputs(model.config), random_noise(model.config, samples=2)

    def actions(num_steps: int, with_solver: SolverName) -> Tensor:
        return reference_actions(model, inputs, noise, num_steps, with_solver)

    exact = actions(256, "midpoint")
    errors = [rel_l2(actions(n, solver), exact) for n in (16, 32, 64)]
    assert all(gain == pytest.approx(GAIN[solver], rel=0.15) for gain in gains(errors)), errors


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_step_of_adams_bashforth_is_eulers(model_type: ModelType) -> None:
    config = small_config(model_type)
    model = reference(config)
    inputs, noise = random_inputs(config), random_noise(config)

    def found(solver: SolverName) -> Tensor:
        return reference_actions(model, inputs, noise, 1, solver)

    assert torch.equal(found("adams_bashforth"), found("euler"))
    assert not torch.equal(found("midpoint"), found("euler"))

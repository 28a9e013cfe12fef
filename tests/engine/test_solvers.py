"""The engine's flow solvers: their calls, and their actions against the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pi0_engine.config import FlowTimes, ModelType, SolverName
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.solvers import CALLS_PER_STEP, NetworkCall, flow_grid, network_calls
from pi0_engine.engine.trace import count_work
from pi0_engine.reference.model import integrate
from pi0_engine.reference.rtc import sample_with_prefix
from pi0_engine.rtc.guidance import FixedPrefix, Guide
from tests.support.models import (
    MODEL_TYPES,
    SECOND_ORDER,
    engine,
    fresh_engine,
    random_inputs,
    random_noise,
    reference,
    reference_actions,
    rel_l2,
    small_config,
    tensors,
)

TOLERANCE = 2e-5
SOLVERS = list(CALLS_PER_STEP)
CAMERAS = [[True, True, True], [False, True, False]]


def times_of_the_reference(solver: SolverName, num_steps: int) -> list[float]:
    asked: list[float] = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        asked.append(float(time))
        return x

    integrate(velocity, torch.zeros(1), num_steps, solver)
    return asked


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 37])
@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_at_the_times_of_the_reference(solver: SolverName, num_steps: int) -> None:
    """To the bit: 1e-7 turns the shortest period of the time embedding by 1e-4."""
    calls, dt = network_calls(solver, num_steps)
    assert [call.time for call in calls] == times_of_the_reference(solver, num_steps)
    assert len(calls) == CALLS_PER_STEP[solver] * num_steps and dt == flow_grid(num_steps)[1]


def test_half_times_are_rounded_as_the_others_are() -> None:
    calls, _ = network_calls("midpoint", 10, "lerobot")
    assert [call.time for call in calls] == [float(torch.tensor(1 - n / 20)) for n in range(20)]


def follow(calls: Sequence[NetworkCall], dt: float, start: Tensor) -> Tensor:
    """What the flow loop does with the calls, on dx/dt = sin(5 x) + t."""
    base = actions = start
    for number, call in enumerate(calls):
        y, origin = dt * (torch.sin(5 * actions) + call.time), base if number else actions
        assert call.advance is not None
        base, actions = origin + call.advance.base * y, origin + call.advance.actions * y
    return actions


@pytest.mark.parametrize("rounding", ["openpi", "lerobot"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_two_points_are_the_textbooks_method(solver: SolverName, num_steps: int, rounding: FlowTimes) -> None:
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = integrate(lambda x, t: torch.sin(5 * x) + t.double(), start, num_steps, solver)
    assert rel_l2(follow(*network_calls(solver, num_steps, rounding), start), expected) <= 1e-6


@pytest.mark.parametrize("num_steps", [1, 2, 7, None])
@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_actions_are_the_references(model_type: ModelType, solver: SolverName, num_steps: int | None) -> None:
    """Two observations of different lengths, two samples each."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, CAMERAS, [5, 3]), random_noise(config, 2, samples=2)
    actions = engine(config, solver=solver).infer(inputs, noise, num_steps=num_steps).actions
    expected = reference_actions(reference(config), inputs, noise, num_steps, solver)
    assert rel_l2(actions, expected) <= TOLERANCE
    if num_steps != 1:
        assert rel_l2(actions, reference_actions(reference(config), inputs, noise, num_steps)) > 1e-3


@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_is_off_as_much_as_eulers(model_type: ModelType, solver: SolverName) -> None:
    """Rounding is the network's, and Adams-Bashforth's weights of 3/2 and -1/2 make it larger: by sqrt(2.5) at most."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config), random_noise(config, samples=8)

    def error(of: SolverName) -> float:
        actions = engine(config, "bfloat16", solver=of).infer(inputs, noise).actions
        return rel_l2(actions, reference_actions(reference(config), inputs, noise, None, of))

    assert 1e-4 < error(solver) <= 1.6 * error("euler") < 0.05


@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_halves_are_the_whole(model_type: ModelType, solver: SolverName) -> None:
    """And nothing of a chunk stays for the next: ``base`` begins anew."""
    config = small_config(model_type)
    running, inputs = fresh_engine(config, solver=solver), random_inputs(config)
    noises = [random_noise(config), random_noise(config) + 1]
    expected = [running.infer(inputs, noise).actions for noise in noises]
    running.observe(inputs)
    for noise, actions in [*zip(noises, expected, strict=True)] * 2:
        for session in running._sessions.values():
            session.space["base"].fill_(torch.nan)
        assert torch.equal(running.sample(noise).actions, actions)


@pytest.mark.parametrize("rows", [(0, 0), (1, 4), (5, 2)])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_a_given_prefix_is_the_references(solver: SolverName, rows: tuple[int, int]) -> None:
    config = small_config("pi05")
    i, noise = random_inputs(config, CAMERAS, [5, 3]), random_noise(config, 2, samples=2)
    prefix = FixedPrefix((random_noise(config, 2)[:, 0] - 1).numpy(), rows)
    actions = engine(config, solver=solver).infer(i, noise, num_steps=4, continuation=prefix).actions
    run, previous = tensors(i), torch.from_numpy(prefix.previous)
    expected = [
        sample_with_prefix(reference(config), *run, sample, previous, rows, num_steps=4, solver=solver)
        for sample in noise.unbind(1)
    ]
    assert rel_l2(actions, torch.stack(expected, dim=1)) <= TOLERANCE
    for b, count in enumerate(rows):
        assert torch.equal(actions[b, :, :count], previous[b, :count].expand(2, -1, -1))


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_a_guide_needs_eulers_steps(solver: SolverName) -> None:
    config = small_config("pi0")
    running, inputs, noise = engine(config, solver=solver), random_inputs(config), random_noise(config)
    guide = Guide(np.zeros((1, 5, 7), np.float32), np.ones((1, 5), np.float32), 1.0)
    message = rf"defined for Euler's flow steps, and the solver is '{solver}'"
    with pytest.raises(ValueError, match=message):
        running.infer(inputs, noise, continuation=guide)
    running.observe(inputs)
    with pytest.raises(ValueError, match=message):
        running.sample(noise, continuation=guide)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_solvers_cost(model_type: ModelType) -> None:
    """One op call less or more for nobody: a call of the network is as many ops with each, its last another one."""
    config = small_config(model_type)
    made = {
        solver: [
            call
            for call in count_work(
                config,
                ShapePlan.of(config, views=[2], prompt_lengths=[3], num_steps=4, solver=solver),
                torch.float32,
            )
            if call.stage == "flow"
        ]
        for solver in SOLVERS
    }
    names = {solver: [call.op for call in calls] for solver, calls in made.items()}
    assert names["euler"].count("rmsnorm_linear_euler") == 4
    for solver in SECOND_ORDER:
        assert "rmsnorm_linear_euler" not in names[solver]
        assert names[solver].count("rmsnorm_linear_second_order") == 4 * CALLS_PER_STEP[solver]
    as_euler = [name.replace("second_order", "euler") for name in names["adams_bashforth"]]
    assert as_euler == names["euler"]
    assert sum(c.cost.flops for c in made["adams_bashforth"]) == sum(c.cost.flops for c in made["euler"])
    state = 0 if config.is_pi05 else 1
    assert len(made["midpoint"]) - state == 2 * (len(made["euler"]) - state)

"""Real-time chunking in the engine: guided chunks and given prefixes, against the reference and against formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.runtime import Engine
from pi0_engine.inputs import ModelInputs
from pi0_engine.reference.model import Pi0Reference, flow_times
from pi0_engine.reference.rtc import sample_guided, sample_with_prefix
from pi0_engine.rtc.guidance import FixedPrefix, Guide
from pi0_engine.rtc.schedule import Schedule, prefix_weights
from tests.support.models import (
    MODEL_TYPES,
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
CAMERAS = [[True, True, True], [False, True, False]]


def guide_of(
    config: Pi0Config,
    schedule: Schedule = "linear",
    *,
    delays: tuple[int, ...] = (2,),
    left: tuple[int, ...] = (4,),
    horizon: int | None = None,
    max_weight: float = 10.0,
    seed: int = 11,
) -> Guide:
    """One random earlier chunk per observation, of which ``left`` actions are left; zeros behind them."""
    horizon = horizon or config.action_horizon
    previous = torch.randn(len(delays), horizon, config.action_dim, generator=torch.Generator().manual_seed(seed))
    weights = []
    for row, delay, length in zip(previous, delays, left, strict=True):
        row[length:] = 0
        weights.append(prefix_weights(schedule, delay, min(10, length), horizon))
    return Guide(previous.numpy(), np.stack(weights), max_weight)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def reference_guided(
    model: Pi0Reference,
    inputs: ModelInputs,
    noise: Tensor,
    guide: Guide,
    num_steps: int | None = None,
) -> Tensor:
    """[B, samples, H, A], each sample a run of its own."""
    run, pull = tensors(inputs), (*(torch.from_numpy(x) for x in (guide.previous, guide.weights)), guide.max_weight)
    samples = [
        sample_guided(model, *run, sample, *pull, num_steps=num_steps)  # type: ignore[arg-type]
        for sample in noise.unbind(1)
    ]
    return torch.stack(samples, dim=1)


@pytest.mark.parametrize("schedule", ["linear", "exp", "ones", "zeros"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_guided_chunks_are_the_references(model_type: ModelType, schedule: Schedule) -> None:
    """Two observations with leftovers of their own, two samples each."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, CAMERAS, [5, 3]), random_noise(config, 2, samples=2)
    guide = guide_of(config, schedule, delays=(2, 1), left=(4, 3))
    actions = engine(config).infer(inputs, noise, num_steps=10, continuation=guide).actions
    expected = reference_guided(reference(config), inputs, noise, guide, 10)
    assert rel_l2(actions, expected) <= TOLERANCE
    assert rel_l2(actions, reference_actions(reference(config), inputs, noise, 10)) > 0.01


@pytest.mark.parametrize(
    ("horizon", "num_steps", "max_weight"), [(1, 1, 0.5), (1, 1, 1.0), (3, 5, 0.5), (3, 5, 1e6), (9, 4, 10.0)]
)
def test_other_horizons_steps_and_bounds(horizon: int, num_steps: int, max_weight: float) -> None:
    """One step has nothing but time 1, where the bound alone holds the pull; steps that are not bounded have w(t)."""
    config = small_config("pi05")
    inputs, noise = random_inputs(config), random_noise(config, horizon=horizon)
    guide = guide_of(config, delays=(1,), left=(horizon,), horizon=horizon, max_weight=max_weight)
    actions = engine(config).infer(inputs, noise, num_steps=num_steps, continuation=guide).actions
    assert rel_l2(actions, reference_guided(reference(config), inputs, noise, guide, num_steps)) <= TOLERANCE


def autograd_sampling(model: Pi0Reference, inputs: ModelInputs, noise: Tensor, guide: Guide, num_steps: int) -> Tensor:
    """The formula as lerobot 0.6 runs it, written anew: a gradient of x - t v that does not pass through v."""
    i = tensors(inputs)
    previous, weights = torch.from_numpy(guide.previous), torch.from_numpy(guide.weights)
    prefix, pad = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
    cache, x = model.prefill(prefix, pad), noise
    for time, dt in flow_times(num_steps):
        with torch.no_grad():
            v = model.velocity(i.state, pad, cache, x, time.expand(len(x)))
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            foreseen = x - time * v
            error = ((previous - foreseen) * weights[:, :, None]).detach()
            correction = torch.autograd.grad((foreseen * error).sum(), x)[0]
        tau = 1 - time
        weight = torch.nan_to_num((1 - tau) / tau, posinf=guide.max_weight) * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2
        x = (x + dt * (v - weight.clamp(max=guide.max_weight) * correction)).detach()
    return x


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_closed_form_is_the_gradient_without_the_network(model_type: ModelType) -> None:
    config = small_config(model_type)
    inputs, noise, guide = random_inputs(config), random_noise(config), guide_of(config)
    with torch.no_grad():
        expected = autograd_sampling(reference(config), inputs, noise[:, 0], guide, 10)
    actions = engine(config).infer(inputs, noise, num_steps=10, continuation=guide).actions[:, 0]
    assert rel_l2(actions, expected) <= 1e-5


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_weights_nothing_changes_bit_for_bit(model_type: ModelType, dtype: str) -> None:
    """And nothing of one chunk stays for the next."""
    config = small_config(model_type)
    running, inputs, noise = engine(config, dtype), random_inputs(config), random_noise(config, samples=2)
    plain = running.infer(inputs, noise).actions
    guide = guide_of(config)
    assert not torch.equal(running.infer(inputs, noise, continuation=guide).actions, plain)
    assert torch.equal(running.infer(inputs, noise).actions, plain)
    nothing = dataclasses.replace(guide, weights=np.zeros_like(guide.weights))
    assert torch.equal(running.infer(inputs, noise, continuation=nothing).actions, plain)


def test_rows_without_a_weight_are_pulled_by_the_others_alone() -> None:
    """Where W is 0, what ``previous`` holds is not read: only its finiteness matters."""
    config = small_config("pi0")
    inputs, noise, guide = random_inputs(config), random_noise(config), guide_of(config, delays=(2,), left=(3,))
    other = guide.previous.copy()
    other[:, 3:] = 1e3
    expected = engine(config).infer(inputs, noise, continuation=guide).actions
    actual = engine(config).infer(inputs, noise, continuation=dataclasses.replace(guide, previous=other)).actions
    assert torch.equal(actual, expected)


def test_one_plan_serves_chunks_with_and_without() -> None:
    """A graph is captured for a plan: guidance is contents of its buffers."""
    config = small_config("pi05")
    running, inputs, noise = fresh_engine(config), random_inputs(config), random_noise(config)
    running.infer(inputs, noise)
    running.infer(inputs, noise, continuation=guide_of(config))
    running.infer(inputs, noise, continuation=guide_of(config, "ones", max_weight=3.0))
    assert len(running._sessions) == 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_sample_of_its_own_is_guided(model_type: ModelType) -> None:
    """The continuation belongs to ``sample``: the same look serves chunks with and without."""
    config = small_config(model_type)
    running, inputs, noise, guide = engine(config), random_inputs(config), random_noise(config), guide_of(config)
    guided, plain = (running.infer(inputs, noise, continuation=c).actions for c in (guide, None))
    running.observe(inputs)
    assert torch.equal(running.sample(noise, continuation=guide).actions, guided)
    assert torch.equal(running.sample(noise).actions, plain)
    assert torch.equal(running.sample(noise, continuation=guide).actions, guided)
    with pytest.raises(ValueError, match=r"previous is float32 \[1, 3, 7\]"):
        running.sample(noise, continuation=guide_of(config, horizon=3))


def test_a_single_step_is_not_pulled_too_far() -> None:
    """The chunk would be what the network foresees, plus ten times the distance to the earlier one."""
    config = small_config("pi0")
    running, inputs, noise, guide = engine(config), random_inputs(config), random_noise(config), guide_of(config)
    with pytest.raises(ValueError, match=r"in a single flow step a max_weight of 10\.0 would overshoot"):
        running.infer(inputs, noise, num_steps=1, continuation=guide)
    running.observe(inputs, num_steps=1)
    with pytest.raises(ValueError, match="in a single flow step"):
        running.sample(noise, continuation=guide)
    gentle = dataclasses.replace(guide, weights=np.ones_like(guide.weights), max_weight=1.0)
    actions = running.infer(inputs, noise, num_steps=1, continuation=gentle).actions
    assert rel_l2(actions[0], torch.from_numpy(guide.previous)) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"previous": zeros(2, 5, 7)}, r"previous is float32 \[2, 5, 7\], expected float32 \[1, 5, 7\]"),
        ({"previous": np.zeros((1, 5, 7))}, r"previous is float64"),
        ({"previous": zeros(1, 5, 7) + np.float32(np.nan)}, "previous contains NaN"),
        ({"weights": zeros(1, 4)}, r"weights is float32 \[1, 4\], expected float32 \[1, 5\]"),
        ({"weights": zeros(1, 5) + np.float32(1.5)}, "weights are not all between 0 and 1"),
        ({"weights": zeros(1, 5) - np.float32(0.5)}, "weights are not all between 0 and 1"),
        ({"previous": torch.zeros(1, 5, 7)}, "previous is of type Tensor, expected a numpy array of float32"),
        ({"max_weight": 0.0}, r"max_weight is 0\.0, expected a positive number"),
        ({"max_weight": float("inf")}, "max_weight is inf"),
    ],
)
def test_an_unusable_guide_is_refused(changes: dict[str, Any], message: str) -> None:
    config = small_config("pi0")
    running: Engine = engine(config)
    guide = dataclasses.replace(guide_of(config), **changes)
    with pytest.raises(ValueError, match=message):
        running.infer(random_inputs(config), random_noise(config), continuation=guide)


def last_row(array: np.ndarray, value: float) -> np.ndarray:
    """With one bad value, the very last: what looks at the first observation only does not see it."""
    changed = array.copy()
    changed[(-1,) * changed.ndim] = value
    return changed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("previous", np.nan, "previous contains NaN"),
        ("previous", np.inf, "previous contains NaN or infinity"),
        ("weights", np.nan, "weights contains NaN"),
        ("weights", 1.5, "weights are not all between 0 and 1"),
        ("weights", -0.1, "weights are not all between 0 and 1"),
    ],
)
def test_the_last_observation_of_a_batch_is_looked_at(name: str, value: float, message: str) -> None:
    config = small_config("pi0")
    guide = guide_of(config, delays=(2, 2), left=(4, 4))
    changed = dataclasses.replace(guide, **{name: last_row(getattr(guide, name), value)})
    inputs, noise = random_inputs(config, CAMERAS, [5, 3]), random_noise(config, 2)
    with pytest.raises(ValueError, match=message):
        engine(config).infer(inputs, noise, continuation=changed)


# --- a given prefix ---

PI05 = small_config("pi05")


def prefix_of(*rows: int, horizon: int = 5, seed: int = 11) -> FixedPrefix:
    shape = (len(rows), horizon, PI05.action_dim)
    return FixedPrefix(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy(), rows)


@pytest.mark.parametrize("rows", [(0, 0), (1, 4), (5, 2)])
@pytest.mark.parametrize("num_steps", [1, 10])
def test_a_given_prefix_is_the_references(rows: tuple[int, int], num_steps: int) -> None:
    """Two observations with prefixes of their own, two samples each: nothing given, some, everything."""
    i, noise, prefix = random_inputs(PI05, CAMERAS, [5, 3]), random_noise(PI05, 2, samples=2), prefix_of(*rows)
    actions = engine(PI05).infer(i, noise, num_steps=num_steps, continuation=prefix).actions
    run, previous = tensors(i), torch.from_numpy(prefix.previous)
    expected = [
        sample_with_prefix(reference(PI05), *run, sample, previous, rows, num_steps=num_steps)
        for sample in noise.unbind(1)
    ]
    assert rel_l2(actions, torch.stack(expected, dim=1)) <= TOLERANCE
    for b, count in enumerate(rows):
        assert torch.equal(actions[b, :, :count], previous[b, :count].expand(2, -1, -1))


def test_a_prefix_of_no_rows_is_none() -> None:
    """Up to rounding: the tables are another addition in the products' biases."""
    inputs, noise = random_inputs(PI05), random_noise(PI05, samples=2)
    plain = engine(PI05).infer(inputs, noise).actions
    assert rel_l2(engine(PI05).infer(inputs, noise, continuation=prefix_of(0)).actions, plain) <= 1e-6
    assert torch.equal(engine(PI05).infer(inputs, noise).actions, plain)


def test_what_is_given_is_not_noise() -> None:
    """The noise under the prefix is not read, nor what ``previous`` holds behind it."""
    inputs, noise, prefix = random_inputs(PI05), random_noise(PI05), prefix_of(2)
    expected = engine(PI05).infer(inputs, noise, continuation=prefix).actions
    other_noise, other = noise.clone(), prefix.previous.copy()
    other_noise[:, :, :2], other[:, 2:] = 1e3, 1e3
    assert torch.equal(engine(PI05).infer(inputs, other_noise, continuation=FixedPrefix(other, (2,))).actions, expected)


def test_one_plan_serves_prefixes_of_any_length() -> None:
    running, inputs, noise = fresh_engine(PI05), random_inputs(PI05), random_noise(PI05)
    for rows in (0, 2, 5):
        running.infer(inputs, noise, continuation=prefix_of(rows))
    assert len(running._sessions) == 1
    running.infer(inputs, noise)
    assert [plan.per_token_time for plan in running._sessions] == [True, False]


def test_a_sample_of_its_own_has_a_prefix() -> None:
    """``observe`` must be told, because it is where the plan is made; what is drawn then may have one or not."""
    running, inputs, noise, prefix = engine(PI05), random_inputs(PI05), random_noise(PI05), prefix_of(2)
    expected = [running.infer(inputs, noise, continuation=c).actions for c in (prefix, prefix_of(0), guide_of(PI05))]
    running.observe(inputs, per_token_time=True)
    assert torch.equal(running.sample(noise, continuation=prefix).actions, expected[0])
    assert torch.equal(running.sample(noise).actions, expected[1])
    assert rel_l2(running.sample(noise, continuation=guide_of(PI05)).actions, expected[2]) <= 1e-6
    assert torch.equal(running.sample(noise, continuation=prefix).actions, expected[0])
    running.observe(inputs)
    with pytest.raises(ValueError, match=r"observe was not told so: observe\(per_token_time=True\)"):
        running.sample(noise, continuation=prefix)


def test_warming_up_for_prefixes() -> None:
    running = fresh_engine(PI05)
    running.warm_up(views=3, per_token_time=True)
    assert [plan.per_token_time for plan in running._sessions] == [True]


@pytest.mark.parametrize("call", ["infer", "observe", "warm_up"])
def test_pi0_has_no_time_per_token(call: str) -> None:
    config = small_config("pi0")
    running, inputs, noise = engine(config), random_inputs(config), random_noise(config)
    with pytest.raises(
        ValueError, match=r"π0 was trained with one flow time for all actions.*needs a π0\.5 checkpoint"
    ):
        if call == "infer":
            running.infer(inputs, noise, continuation=prefix_of(2))
        elif call == "observe":
            running.observe(inputs, per_token_time=True)
        else:
            running.warm_up(views=1, per_token_time=True)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (prefix_of(6), r"rows are \(6,\), expected 1 of 0 to 5"),
        (prefix_of(-1), r"rows are \(-1,\)"),
        (FixedPrefix(zeros(1, 5, 7), (1, 1)), r"rows are \(1, 1\), expected 1 of 0 to 5"),
        (FixedPrefix(zeros(1, 5, 7), (1.5,)), r"rows are \(1\.5,\)"),  # type: ignore[arg-type]
        (prefix_of(2, horizon=4), r"previous is float32 \[1, 4, 7\], expected float32 \[1, 5, 7\]"),
    ],
)
def test_an_unusable_prefix_is_refused(prefix: FixedPrefix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(PI05).infer(random_inputs(PI05), random_noise(PI05), continuation=prefix)


@pytest.mark.parametrize("rows", [(1, 6), (1, -1), (1,), (1, 2, 3)])
def test_the_last_rows_of_a_batch_are_looked_at(rows: tuple[int, ...]) -> None:
    prefix = dataclasses.replace(prefix_of(1, 2), rows=rows)
    with pytest.raises(ValueError, match=r"rows are .*, expected 2 of 0 to 5"):
        engine(PI05).infer(random_inputs(PI05, CAMERAS, [5, 3]), random_noise(PI05, 2), continuation=prefix)


def test_the_last_given_action_of_a_batch_is_looked_at() -> None:
    prefix = prefix_of(1, 2)
    changed = dataclasses.replace(prefix, previous=last_row(prefix.previous, np.nan))
    with pytest.raises(ValueError, match="previous contains NaN"):
        engine(PI05).infer(random_inputs(PI05, CAMERAS, [5, 3]), random_noise(PI05, 2), continuation=changed)

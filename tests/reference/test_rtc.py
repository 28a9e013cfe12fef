"""The oracle of real-time chunking, against formulas and models written anew here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pi0_engine.reference.layers import AdaRMSNorm, KVCache
from pi0_engine.reference.model import Pi0Reference, flow_times, time_embedding
from pi0_engine.reference.rtc import guidance_weight, guided_velocity, sample_with_prefix
from tests.support.models import random_inputs, random_noise, reference, rel_l2, small_config, tensors

CONFIG = small_config("pi05")


def context(model: Pi0Reference) -> tuple[Tensor, Tensor, KVCache]:
    """State, prefix mask and cache of one observation."""
    i = tensors(random_inputs(CONFIG))
    with torch.no_grad():
        prefix, pad = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
        return i.state, pad, model.prefill(prefix, pad)


@pytest.mark.parametrize(
    ("time", "expected"),
    [(0.5, 2.0), (0.25, 0.625 / 0.1875), (0.75, 0.625 / 0.1875), (0.9, 0.82 / 0.09), (1.0, 10.0), (0.99, 10.0)],
)
def test_guidance_weight_by_hand(time: float, expected: float) -> None:
    """(t^2 + (1 - t)^2) / (t (1 - t)), at most 10; infinite without the bound at time 1."""
    assert float(guidance_weight(torch.tensor(time), 10.0)) == pytest.approx(expected, rel=1e-6)
    assert float(guidance_weight(torch.tensor(1.0), math.inf)) == math.inf


def test_the_full_correction_is_the_vector_jacobian_product() -> None:
    """Against finite differences of what a step foresees: <J^T error, d> = <error, J d>."""
    model = reference(CONFIG)
    state, pad, cache = context(model)
    x, time, previous = random_noise(CONFIG)[:, 0], torch.tensor(0.5), random_noise(CONFIG)[:, 0].flip(1)
    weights = torch.tensor([[1.0, 1.0, 0.5, 0.25, 0.0]])
    arguments = (model, state, pad, cache, x, time, previous, weights, 10.0)
    full, identity = (guided_velocity(*arguments, jacobian) for jacobian in ("full", "identity"))  # type: ignore[arg-type]
    with torch.no_grad():

        def foreseen(at: Tensor) -> Tensor:
            return at - time * model.velocity(state, pad, cache, at, time.expand(1))

        v = model.velocity(state, pad, cache, x, time.expand(1))
        error = weights[..., None] * (previous - foreseen(x))
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        slope = (foreseen(x + 1e-2 * direction) - foreseen(x - 1e-2 * direction)) / 2e-2
    correction = (v - full) / 2.0
    assert float((correction * direction).sum()) == pytest.approx(float((error * slope).sum()), rel=2e-3)
    assert rel_l2((v - identity) / 2.0, error) <= 1e-5
    assert rel_l2(full, identity) > 1e-3


def test_an_unknown_jacobian_is_refused() -> None:
    nothing = torch.zeros(1)
    with pytest.raises(ValueError, match="jacobian is 'none'"):
        guided_velocity(reference(CONFIG), *[nothing] * 2, [], *[nothing] * 4, 10.0, "none")  # type: ignore[arg-type]


@contextmanager
def norms_of_two_times(model: Pi0Reference, given: Tensor) -> Iterator[None]:
    """Every adaRMS norm twice, as in a chunk at the step's time and as in one at time 0: ``given`` rows take these."""

    def condition(time: Tensor) -> Tensor:
        return model.embed_suffix(torch.zeros(1, 7), torch.zeros(1, 5, 7), time)[1]  # type: ignore[return-value]

    clean, forward = condition(torch.zeros(1)), AdaRMSNorm.forward

    def mixed(self: AdaRMSNorm, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        (at_step, gate), (at_zero, gate_at_zero) = forward(self, x, cond), forward(self, x, clean)
        which = given[..., None]
        return torch.where(which, at_zero, at_step), torch.where(which, gate_at_zero, gate)

    AdaRMSNorm.forward = mixed  # type: ignore[method-assign]
    try:
        yield
    finally:
        AdaRMSNorm.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_a_given_prefix_is_at_time_0(rows: int) -> None:
    model, i = reference(CONFIG), tensors(random_inputs(CONFIG))
    state, pad, cache = context(model)
    noise, previous = random_noise(CONFIG)[:, 0], random_noise(CONFIG)[:, 0].flip(1) / 2
    given = (torch.arange(5) < rows)[None]
    x = noise.clone()
    x[:, :rows] = previous[:, :rows]
    with torch.no_grad(), norms_of_two_times(model, given):
        for time, dt in flow_times(4):
            v = model.velocity(state, pad, cache, x, time.expand(1))
            x[:, rows:] += dt * v[:, rows:]
    images = (i.images, i.image_masks, i.tokens, i.token_mask, i.state)
    found = sample_with_prefix(model, *images, noise, previous, [rows], num_steps=4)
    assert rel_l2(found, x) <= 1e-6
    assert torch.equal(found[:, :rows], previous[:, :rows])
    plain = model.sample_actions(*images, noise, 4)
    assert rel_l2(found, plain) <= 1e-6 if rows == 0 else rel_l2(found, plain) > 1e-2


def test_time_embedding_of_each_token() -> None:
    times = torch.tensor([[0.0, 0.3, 1.0], [0.9, 0.0, 0.5]])
    assert torch.equal(time_embedding(times, 28)[1], time_embedding(times[1], 28))

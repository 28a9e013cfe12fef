"""lerobot's real-time chunking arguments on our engine, against lerobot's own ``RTCProcessor``."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor

from pi0_engine.integrations.lerobot import accelerate
from pi0_engine.integrations.lerobot_sampler import guide_of
from pi0_engine.rtc.schedule import prefix_weights
from tests.lerobot.small_policies import random_batch, small_policy, worst

SCHEDULES = list(RTCAttentionSchedule)
#: (inference_delay, steps left over, execution_horizon or None): also none left, a delay beyond what is left, and all.
CASES = [(0, 12, None), (3, 12, None), (3, 12, 6), (5, 4, 10), (20, 9, 16), (4, 16, 16), (0, 0, 5), (2, 7, 2)]


def with_rtc(kind: str, **options: Any) -> tuple[Any, Any]:
    """lerobot's policy and ours; RTC is set after loading, as lerobot-rollout does it."""
    theirs = small_policy(kind)
    ours = accelerate(copy.deepcopy(theirs))
    for policy in (theirs, ours):
        policy.config.rtc_config = RTCConfig(**options)
        policy.init_rtc_processor()
    return theirs, ours


def chunk(policy: Any, size: int = 2, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return policy.predict_action_chunk(random_batch(size), **arguments)


def leftover(steps: int, size: int = 2, width: int = 6) -> torch.Tensor:
    return torch.randn(size, steps, width, generator=torch.Generator().manual_seed(steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prefix_weights_are_lerobots(schedule: RTCAttentionSchedule) -> None:
    processor = RTCProcessor(RTCConfig(prefix_attention_schedule=schedule))
    for delay, end, horizon in itertools.product(range(0, 20, 3), range(0, 17, 2), (16, 30)):
        expected = processor.get_prefix_weights(delay, end, horizon)
        found = torch.from_numpy(prefix_weights(schedule.value.lower(), delay, end, horizon))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_guided_step_is_lerobots(schedule: RTCAttentionSchedule) -> None:
    """The closed form v - w (previous - (x - t v)) without a backward pass, in every one of ten steps."""
    config = RTCConfig(prefix_attention_schedule=schedule, max_guidance_weight=7.0)
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 3
    x_t = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(2))
    for (delay, steps, horizon), step in itertools.product(CASES, range(10)):
        time = 1.0 - step / 10
        expected = RTCProcessor(config).denoise_step(
            x_t=x_t,
            prev_chunk_left_over=leftover(steps),
            inference_delay=delay,
            time=time,
            original_denoise_step_partial=lambda x: (x @ matrix).sin(),
            execution_horizon=horizon,
        )
        guide = guide_of(config, (2, 16, 8), delay, leftover(steps), horizon)
        v = (x_t @ matrix).sin()
        bound = (time**2 + (1 - time) ** 2) / (time * (1 - time)) if time < 1 else float("inf")
        weights, previous = torch.from_numpy(guide.weights), torch.from_numpy(guide.previous)
        pull = min(bound, guide.max_weight) * weights[..., None]
        assert worst(v - pull * (previous - (x_t - time * v)), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guided_chunks_are_lerobots(kind: str, schedule: RTCAttentionSchedule) -> None:
    theirs, ours = with_rtc(kind, prefix_attention_schedule=schedule, execution_horizon=8)
    pulled = []
    for delay, steps, horizon in CASES:
        arguments = {
            "inference_delay": delay,
            "prev_chunk_left_over": leftover(steps),
            "execution_horizon": horizon,
        }
        expected, actual = chunk(theirs, **arguments), chunk(ours, **arguments)
        assert worst(actual, expected) <= 1e-4, (delay, steps, horizon)
        pulled.append(worst(expected, chunk(theirs)))
    assert max(pulled) > 0.1  # guidance did something


def test_a_strong_pull_reaches_the_old_chunk() -> None:
    theirs, ours = with_rtc("pi0", max_guidance_weight=30.0)
    old = leftover(12)
    arguments = {"inference_delay": 5, "prev_chunk_left_over": old, "num_steps": 10}
    for policy in (theirs, ours):
        pulled, free = chunk(policy, **arguments), chunk(policy, num_steps=10)
        assert (pulled[:, :5] - old[:, :5]).norm() < 0.5 * (free[:, :5] - old[:, :5]).norm()
    assert worst(chunk(ours, **arguments), chunk(theirs, **arguments)) <= 1e-4


def test_leftover_without_a_batch_axis() -> None:
    """As lerobot-rollout passes it."""
    theirs, ours = with_rtc("pi0")
    arguments = {"inference_delay": 2, "prev_chunk_left_over": leftover(10, 1)[0]}
    assert worst(chunk(ours, 1, **arguments), chunk(theirs, 1, **arguments)) <= 1e-4
    assert worst(chunk(ours, 2, **arguments), chunk(theirs, 2, **arguments)) <= 1e-4


def test_without_leftover_or_enabled_nothing_is_guided() -> None:
    theirs, ours = with_rtc("pi05")
    free = chunk(theirs)
    assert worst(chunk(ours, inference_delay=3, prev_chunk_left_over=None), free) <= 1e-4
    for policy in (theirs, ours):
        policy.config.rtc_config.enabled = False
    arguments = {"inference_delay": 3, "prev_chunk_left_over": leftover(10)}
    assert worst(chunk(theirs, **arguments), free) == 0
    assert worst(chunk(ours, **arguments), free) <= 1e-4


def test_a_guided_chunk_leaves_nothing_behind() -> None:
    _, ours = with_rtc("pi0")
    before = chunk(ours)
    chunk(ours, inference_delay=3, prev_chunk_left_over=leftover(10))
    assert torch.equal(chunk(ours), before)


def test_what_does_not_fit_is_refused() -> None:
    _, ours = with_rtc("pi0")
    with pytest.raises(ValueError, match="inference_delay is None"):
        chunk(ours, prev_chunk_left_over=leftover(10))
    for wrong in (leftover(17), leftover(10, 3), leftover(10, 2, 9), leftover(10)[None]):
        with pytest.raises(ValueError, match=r"prev_chunk_left_over is \[.*\], expected at most \[2, 16, 8\]"):
            chunk(ours, inference_delay=1, prev_chunk_left_over=wrong)
    ours.config.rtc_config.debug = True
    with pytest.raises(ValueError, match="debug is true"):
        chunk(ours)

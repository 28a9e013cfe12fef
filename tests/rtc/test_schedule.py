"""Real-time chunking: what robot and policy tell each other, and how the pull fades."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0_engine.rtc.schedule import DelayEstimator, Leftover, RtcConfig, prefix_weights

SCHEDULES = ["linear", "exp", "ones", "zeros"]


def weights_one_by_one(schedule: str, delay: int, execution_horizon: int, horizon: int) -> NDArray[np.float64]:
    """The definition, a step at a time: 1 before the delay, 0 behind the execution horizon, the schedule between."""
    found = []
    start, end = min(delay, execution_horizon), execution_horizon
    for k in range(horizon):
        left = (min(end, horizon) - k) / (min(end, horizon) - start + 1) if start <= k < end else 0.0
        between = {"linear": left, "exp": left * (math.exp(left) - 1) / (math.e - 1), "ones": 1.0, "zeros": 0.0}
        found.append(1.0 if k < start else between[schedule] if k < end else 0.0)
    return np.array(found)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("execution_horizon", [0, 1, 4, 10, 11, 50])
@pytest.mark.parametrize("delay", [0, 1, 4, 5, 10, 60])
def test_prefix_weights(schedule: Any, delay: int, execution_horizon: int) -> None:
    """Among them: no delay, a delay beyond the horizon of execution, and either beyond the chunk's end."""
    for horizon in (1, 5, 10, 30):
        weights = prefix_weights(schedule, delay, execution_horizon, horizon)
        assert weights.dtype == np.float32 and weights.shape == (horizon,)
        expected = weights_one_by_one(schedule, delay, execution_horizon, horizon)
        np.testing.assert_allclose(weights, expected, atol=1e-7)


def test_prefix_weights_by_hand() -> None:
    np.testing.assert_allclose(prefix_weights("linear", 2, 5, 7), [1, 1, 0.75, 0.5, 0.25, 0, 0])
    np.testing.assert_array_equal(prefix_weights("ones", 2, 5, 7), [1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(prefix_weights("zeros", 2, 5, 7), [1, 1, 0, 0, 0, 0, 0])
    exp = [u * (math.e**u - 1) / (math.e - 1) for u in (2 / 3, 1 / 3)]
    np.testing.assert_allclose(prefix_weights("exp", 1, 3, 4), [1, *exp, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", 1, 2, 3), "schedule is 'cubic', expected one of"),
        (("linear", -1, 2, 3), "delay is -1"),
        (("linear", 1, 2.5, 3), r"execution_horizon is 2\.5"),
        (("linear", 1, 2, True), "horizon is True"),
    ],
)
def test_weights_of_nothing_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefix_weights(*arguments)


def test_the_default_configuration_is_lerobots() -> None:
    assert RtcConfig() == RtcConfig("guided", "linear", 10, 10.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "hard"}, r"rtc mode is 'hard', expected one of \['guided', 'trained'\]"),
        ({"schedule": ["linear"]}, r"rtc schedule is \['linear'\]"),
        ({"execution_horizon": 0}, "rtc execution_horizon is 0"),
        ({"execution_horizon": True}, "rtc execution_horizon is True"),
        ({"max_guidance_weight": 0}, "rtc max_guidance_weight is 0"),
        ({"max_guidance_weight": math.inf}, "rtc max_guidance_weight is inf"),
        ({"max_guidance_weight": math.nan}, "rtc max_guidance_weight is nan"),
        ({"max_guidance_weight": "10"}, "rtc max_guidance_weight is '10'"),
    ],
)
def test_an_impossible_configuration_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RtcConfig(**arguments)


def test_leftover_takes_lists_and_nothing() -> None:
    given = Leftover([[1, 2], [3, 4]], np.int64(1))  # type: ignore[arg-type]
    assert len(given) == 2 and given.delay == 1 and isinstance(given.delay, int)
    assert len(Leftover(np.zeros((0, 7)), 0)) == 0


@pytest.mark.parametrize(
    ("actions", "delay", "message"),
    [
        (np.zeros(7), 0, r"leftover actions are float64 \[7\], expected float \[L, action_dim\]"),
        (np.array([["a"]]), 0, "leftover actions are <U1"),
        (np.array([[1.0, np.nan]]), 0, "leftover actions contain NaN or infinity"),
        (np.zeros((3, 7)), -1, "leftover delay is -1"),
        (np.zeros((3, 7)), 1.0, r"leftover delay is 1\.0"),
    ],
)
def test_an_impossible_leftover_is_refused(actions: Any, delay: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Leftover(actions, delay)


def test_delay_is_the_largest_recent_latency_in_steps() -> None:
    estimator = DelayEstimator(50.0, window=3, warm_up=1)
    assert estimator.delay() == 0
    estimator.add(9.0)  # compiling, capturing: happens once
    assert estimator.delay() == 0
    for latency, expected in [(0.03, 2), (0.11, 6), (0.04, 6), (0.02, 6), (0.02, 2), (0.02, 1)]:
        estimator.add(latency)
        assert estimator.delay() == expected


def test_delay_without_warm_up_and_on_whole_steps() -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    estimator = DelayEstimator(100, warm_up=0)
    estimator.add(0.07)
    assert estimator.delay() == 7
    estimator.add(0.0701)
    assert estimator.delay() == 8
    many = DelayEstimator(10, warm_up=3)
    for latency in (5.0, 4.0, 3.0, 0.25):
        many.add(latency)
    assert many.delay() == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_hz": 0}, "control_hz is 0"),
        ({"control_hz": math.inf}, "control_hz is inf"),
        ({"control_hz": 50, "window": 0}, "window is 0"),
        ({"control_hz": 50, "warm_up": -1}, "warm_up is -1"),
    ],
)
def test_an_impossible_estimator_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayEstimator(**arguments)


@pytest.mark.parametrize("latency", [-0.1, math.nan, math.inf, "0.1"])
def test_an_impossible_latency_is_refused(latency: Any) -> None:
    with pytest.raises(ValueError, match="expected a finite number of at least 0"):
        DelayEstimator(50).add(latency)

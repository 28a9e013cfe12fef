"""Guards of actions: what they find, and that what they let through keeps them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pi0_engine.robots.guards import Guards, GuardViolation, check, check_age

#: Two joints and a gripper at 10 actions per second: 0.5 units per step at most.
GUARDS = Guards("clip", limits=((-1, 1), (-2, 2), None), max_velocity=(5, 5, None), max_jump=(0.25, None, None))
STATE = np.zeros(3)


def chunk(*rows: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def kinds(report: Any) -> list[tuple[str, int | None, int | None]]:
    return [(violation.kind, violation.dim, violation.step) for violation in report.violations]


# --- what is found -------------------------------------------------------------------------------------------------


def test_a_chunk_within_the_guards_is_the_same_array() -> None:
    actions = chunk((0.25, 1, 9), (0.75, 1.5, -9), (1, 2, 9))  # every bound is reached, none is crossed
    report = check(actions, STATE, GUARDS, 10)
    assert report.actions is actions and report.applied == "none" and report.violations == ()
    assert report.to_dict() == {"applied": "none", "violations": [], "count": 0}


def test_each_violation_names_its_dimension_step_value_and_limit() -> None:
    actions = chunk((0.5, 0, 0), (0.5, 0.25, 0), (0.5, -2.5, 0))
    with pytest.raises(GuardViolation, match=r"jump of dimension 0 at step 0: 0\.5, limit 0\.25, and 2 more") as error:
        check(actions, STATE, Guards("refuse", GUARDS.limits, GUARDS.max_velocity, GUARDS.max_jump), 10)
    assert error.value.code == "guard_violation"
    assert [violation.to_dict() for violation in error.value.violations] == [
        {"kind": "jump", "dim": 0, "step": 0, "value": 0.5, "limit": 0.25},
        {"kind": "limit", "dim": 1, "step": 2, "value": -2.5, "limit": -2},
        {"kind": "velocity", "dim": 1, "step": 2, "value": 27.5, "limit": 5},
    ]


def test_a_jump_is_from_the_state_in_either_direction() -> None:
    guards = Guards("refuse", max_jump=(0.5, 0.5))
    check(chunk((0.5, 2.5)), np.array([1.0, 2.0]), guards)
    for first in ((0.4, 2), (1, 2.6)):
        with pytest.raises(GuardViolation, match="jump"):
            check(chunk(first), np.array([1.0, 2.0]), guards)
    check(chunk((1, 2), (9, 9)), np.array([1.0, 2.0]), guards)  # of the first action only


def test_velocities_have_limits_and_no_relation_to_the_state() -> None:
    """Joint velocities: the state is where the arm is, not how fast it moves."""
    guards = Guards("clip", limits=((-0.5, 0.5),) * 2)
    report = check(chunk((0.1, -0.6), (0.1, 0.2)), np.array([3.0, -3.0]), guards)
    np.testing.assert_array_equal(report.actions, chunk((0.1, -0.5), (0.1, 0.2)))


def test_a_float32_action_may_be_at_the_float32_of_its_limit() -> None:
    guards = Guards("refuse", limits=((-3.1, 3.1),), max_jump=(0.1,))
    assert float(np.float32(0.1)) > 0.1 and float(np.float32(0.1)) - 0 <= float(np.float32(0.1))
    check(chunk((0.1,), (-3.1,), (np.float32(3.1),)), np.zeros(1), guards)
    with pytest.raises(GuardViolation):
        check(chunk((np.nextafter(np.float32(0.1), np.float32(1)),)), np.zeros(1), guards)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("guards", [None, GUARDS, Guards("hold", max_jump=(9, 9, 9)), Guards(max_observation_age_ms=1)])
def test_nan_and_infinity_are_refused_whatever_is_declared(value: float, guards: Guards | None) -> None:
    actions = chunk((0, 0, 0), (0, value, 0))
    with pytest.raises(GuardViolation, match="not_finite of dimension 1 at step 1") as error:
        check(actions, STATE, guards, 10)
    assert error.value.code == "not_finite"


def test_without_guards_everything_finite_passes() -> None:
    actions = chunk((1e30, -1e30, 0))
    assert check(actions, STATE, None).actions is actions


def test_observation_age() -> None:
    guards = Guards("clip", max_observation_age_ms=200)
    check_age(200, guards)
    check_age(1e9, None)
    check_age(1e9, GUARDS)
    for age in (200.1, math.nan):
        with pytest.raises(GuardViolation, match=r"observation_age: .*limit 200") as error:
            check_age(age, guards)
        assert error.value.code == "stale_observation"


# --- what is done about it -----------------------------------------------------------------------------------------


def test_clip_goes_on_from_what_was_sent() -> None:
    actions = chunk((0.5, 0, 0), (0.75, 3, 0), (0.75, 3, 0), (0.75, 0, 0))
    report = check(actions, STATE, GUARDS, 10)
    assert report.applied == "clip"
    # 0.25 of the jump; then 0.5 per step, so that the second dimension never arrives at 2.
    np.testing.assert_array_equal(report.actions, chunk((0.25, 0, 0), (0.75, 0.5, 0), (0.75, 1, 0), (0.75, 0.5, 0)))
    assert kinds(report) == [
        ("jump", 0, 0), ("limit", 1, 1), ("velocity", 1, 1), ("limit", 1, 2), ("velocity", 1, 3)
    ]  # fmt: skip
    np.testing.assert_array_equal(actions[1], [0.75, 3, 0])  # not modified


def test_hold_repeats_the_last_good_action() -> None:
    guards = Guards("hold", limits=((-1, 1),) * 2, max_jump=(0.5, 0.5))
    report = check(chunk((0.1, 0.2), (0.3, 0.4), (0.5, 1.5), (0.6, 0.6)), np.zeros(2), guards)
    np.testing.assert_array_equal(report.actions, chunk((0.1, 0.2), (0.3, 0.4), (0.3, 0.4), (0.3, 0.4)))
    assert report.applied == "hold" and kinds(report) == [("limit", 1, 2)]


def test_hold_stays_where_the_robot_is_if_the_first_action_is_bad() -> None:
    guards = Guards("hold", max_jump=(0.5, 0.5))
    report = check(chunk((0, 2), (0, 2)), np.array([0.25, 1, 77]), guards)
    np.testing.assert_array_equal(report.actions, chunk((0.25, 1), (0.25, 1)))


def test_a_robot_outside_its_limits_is_led_back_no_faster_than_allowed() -> None:
    guards = Guards("clip", limits=((-1, 1),), max_velocity=(5,), max_jump=(0.25,))
    report = check(chunk((0,), (0,), (0,), (0,)), np.array([2.0]), guards, 10)
    np.testing.assert_array_equal(report.actions, chunk((1.75,), (1.25,), (0.75,), (0.25,)))
    assert kinds(report) == [("jump", 0, 0), ("unreachable", 0, 0), ("unreachable", 0, 1)]
    assert report.violations[1].value == 1.75 and report.violations[1].limit == 1
    # Held, it stays outside, and the report says so.
    held = check(chunk((0,), (0,)), np.array([2.0]), Guards("hold", limits=((-1, 1),), max_jump=(0.25,)))
    np.testing.assert_array_equal(held.actions, chunk((2,), (2,)))
    assert kinds(held) == [("jump", 0, 0), ("unreachable", 0, 0), ("unreachable", 0, 1)]


def test_the_reply_is_bounded() -> None:
    report = check(np.full((50, 32), 5, np.float32), np.zeros(32), Guards("clip", limits=((-1, 1),) * 32))
    told = json.loads(json.dumps(report.to_dict()))
    assert told["applied"] == "clip" and told["count"] == 1600 and len(told["violations"]) == 16
    assert told["violations"][15] == {"kind": "limit", "dim": 15, "step": 0, "value": 5, "limit": 1}


# --- for all chunks ------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([np.float32, np.float64])


@st.composite
def guarded(draw: st.DrawFn, *, hold: bool = False) -> tuple[NDArray[Any], NDArray[Any], Guards, float]:
    """A chunk, a state, guards and a control rate; sizes from tiny to enormous, a state inside or outside."""
    dims, horizon = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    size = st.sampled_from([1e-3, 1.0, 50.0])
    number = st.floats(-1, 1, width=32)
    scale = draw(size)
    actions = scale * draw(hnp.arrays(draw(DTYPES), (horizon, dims), elements=number))
    state = draw(size) * draw(hnp.arrays(np.float64, dims, elements=st.floats(-1, 1)))
    positive = st.floats(1e-4, 100)

    def each(entry: st.SearchStrategy[Any], free: bool = True) -> Any:
        return draw(st.tuples(*[st.none() | entry if free else entry] * dims))

    pair = st.tuples(st.floats(-60, -1e-3), st.floats(0, 60))
    guards = Guards(
        "hold" if hold else "clip",
        limits=each(pair),
        max_velocity=each(positive),
        max_jump=each(positive, free=not hold),
    )
    return actions, state, guards, draw(st.floats(0.5, 500))


def remaining(report: Any, state: NDArray[Any], guards: Guards, hz: float) -> list[tuple[str, int | None]]:
    """What a second check finds in the result."""
    return [(v.kind, v.dim) for v in check(report.actions, state, guards, hz).violations if v.kind != "unreachable"]


@settings(max_examples=200)
@given(guarded())
def test_a_clipped_chunk_keeps_every_guard(case: tuple[NDArray[Any], NDArray[Any], Guards, float]) -> None:
    actions, state, guards, hz = case
    report = check(actions, state, guards, hz)
    again = check(report.actions, state, guards, hz)
    np.testing.assert_array_equal(again.actions, report.actions)  # clipping a second time changes nothing
    # Only a robot outside of its limits leaves something: limits that it is on its way back to.
    position = state.astype(actions.dtype)
    for kind, dim in remaining(report, state, guards, hz):
        assert kind == "limit" and dim is not None and guards.limits is not None and guards.max_jump is not None
        pair = guards.limits[dim]
        assert pair is not None and guards.max_jump[dim] is not None
        low, high = np.array(pair, actions.dtype)
        assert not low <= position[dim] <= high
        toward = np.diff(np.concatenate([position[None], report.actions])[:, dim])
        assert (toward[0] > 0) == (position[dim] < low)
    told = {(v.dim, v.step) for v in report.violations if v.kind == "unreachable"}
    assert told == {(v.dim, v.step) for v in again.violations if v.kind == "limit"}


@settings(max_examples=200)
@given(guarded())
def test_numbers_within_every_guard_stay_bit_for_bit(case: tuple[NDArray[Any], NDArray[Any], Guards, float]) -> None:
    actions, state, guards, hz = case
    report = check(actions, state, guards, hz)
    broken = {v.dim for v in report.violations}
    for dim in set(range(actions.shape[1])) - broken:
        assert report.actions[:, dim].tobytes() == actions[:, dim].tobytes()
    if not report.violations:
        assert report.actions is actions and report.applied == "none"
    else:
        first = min(v.step for v in report.violations if v.step is not None)
        assert report.actions[:first].tobytes() == actions[:first].tobytes()
        assert report.actions.dtype == actions.dtype and report.applied == "clip"


@settings(max_examples=200)
@given(guarded(hold=True))
def test_a_held_chunk_keeps_every_guard_and_stands_still(
    case: tuple[NDArray[Any], NDArray[Any], Guards, float],
) -> None:
    actions, state, guards, hz = case
    report = check(actions, state, guards, hz)
    if not report.violations:
        assert report.actions is actions
        return
    first = min(v.step for v in report.violations if v.step is not None)
    good = actions[first - 1] if first else state.astype(actions.dtype)
    np.testing.assert_array_equal(report.actions[:first], actions[:first])
    np.testing.assert_array_equal(report.actions[first:], np.broadcast_to(good, actions[first:].shape))
    unreachable = any(v.kind == "unreachable" for v in report.violations)
    assert unreachable == bool(remaining(report, state, guards, hz))
    assert not unreachable or first == 0  # only the state itself can be outside


def test_a_negative_zero_at_a_limit_stays_one() -> None:
    actions = chunk((-0.0, 5), (-0.0, 0))
    report = check(actions, np.zeros(2), Guards("clip", limits=((0.0, 1), (-1, 1)), max_velocity=(1, 100)), 10)
    assert np.signbit(report.actions[:, 0]).all() and report.applied == "clip"


# --- declarations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "guards without any limit"),
        ({"on_violation": "stop", "max_jump": (1,)}, r"on_violation is 'stop', expected one of \['refuse', 'clip'"),
        ({"limits": ((1, 1),)}, r"limits\[0\] is \(1, 1\), expected two finite numbers, the lower first"),
        ({"limits": (None, (2, 1))}, r"limits\[1\] is \(2, 1\)"),
        ({"limits": ((0, math.inf),)}, r"limits\[0\] is \(0, inf\)"),
        ({"limits": ((0, 1e300),)}, r"limits\[0\]"),
        ({"limits": ((0, 1, 2),)}, r"limits\[0\]"),
        ({"max_velocity": (None, 0)}, r"max_velocity\[1\] is 0, expected a finite number above 0"),
        ({"max_velocity": (math.nan,)}, r"max_velocity\[0\] is nan"),
        ({"max_jump": (-1,)}, r"max_jump\[0\] is -1"),
        ({"max_observation_age_ms": 0}, "max_observation_age_ms is 0, expected milliseconds above 0"),
    ],
)
def test_unusable_limits_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guards(**arguments)


@pytest.mark.parametrize(
    ("arguments", "control_hz", "message"),
    [
        ({"limits": ((0, 1),)}, None, "limits has 1 entries, expected 3"),
        ({"max_velocity": (1, 1, 1)}, None, "needs control_hz"),
        ({"max_velocity": (1, 1, 1)}, 0.0, r"control_hz is 0\.0, expected actions per second"),
        ({"max_jump": (1, 1, 1)}, None, r"max_jump is given for action dimensions \[2\], but the state has 2"),
        ({"on_violation": "hold", "max_jump": (1, None, None)}, None, r"dimensions \[1, 2\] have no max_jump"),
        ({"on_violation": "hold", "limits": ((0, 1),) * 3}, None, r"dimensions \[0, 1, 2\] have no max_jump"),
    ],
)
def test_guards_of_another_robot_are_refused(arguments: dict[str, Any], control_hz: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check(np.zeros((4, 3), np.float32), np.zeros(2), Guards(**arguments), control_hz)
    assert not isinstance(error.value, GuardViolation)


@pytest.mark.parametrize(
    ("actions", "state", "message"),
    [
        (np.zeros((2, 4, 3), np.float32), STATE, r"float32 \[2, 4, 3\], expected one chunk, float \[H, A\]"),
        (np.zeros((0, 3), np.float32), STATE, r"\[0, 3\], expected one chunk"),
        (np.zeros((4, 3), np.int64), STATE, "int64"),
        (np.zeros((4, 3), np.float32), np.full(3, np.nan), "expected one state .* of finite numbers"),
        (np.zeros((4, 3), np.float32), np.zeros((1, 3)), "expected one state"),
    ],
)
def test_what_is_not_one_chunk_is_refused(actions: NDArray[Any], state: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(actions, state, GUARDS, 10)

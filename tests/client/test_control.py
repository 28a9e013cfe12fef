"""A control loop step by step, in time that the test tells: holds, splices, the watchdog, what counts how."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0_engine.client.control import Answer, ChunkControl, Request, Step

HZ = 50.0
H, DIMS = 10, 3
OBSERVATION: dict[str, Any] = {"state": np.zeros(DIMS)}


def actions(tick: int, length: int = H) -> np.ndarray:
    """Action k of the chunk observed at a tick is 100 * tick + k in all dimensions."""
    return np.repeat(100.0 * tick + np.arange(length)[:, None], DIMS, axis=1).astype(np.float32)


class Loop:
    """A control loop in virtual time whose policy answers ``latency`` steps later."""

    def __init__(self, **options: Any) -> None:
        self.control = ChunkControl(**{"control_hz": HZ, "hold": "last", **options})
        self.now = 0.0
        self.requests: list[Request] = []
        self.open: Request | None = None

    def step(self, seconds: float = 1 / HZ) -> Step:
        step, request = self.control.step(self.now, OBSERVATION)
        if request is not None:
            assert self.open is None, "two inferences at once"
            self.open = request
            self.requests.append(request)
        self.now += seconds
        return step

    def steps(self, count: int) -> list[Step]:
        return [self.step() for _ in range(count)]

    def answer(self, given: Any = None, name: Any = None) -> None:
        assert self.open is not None
        request, self.open = self.open, None
        self.control.finish(request, Answer(actions(request.tick) if given is None else given, name), self.now)


def test_the_first_chunk_begins_with_its_first_action_and_later_ones_with_that_of_the_step() -> None:
    loop = Loop()
    first = loop.steps(4)
    assert [(s.source, s.action, s.tick) for s in first] == [("waiting", None, 0)] * 4
    loop.answer()
    loop.steps(1)
    executed = loop.steps(3)
    assert [s.index for s in executed] == [1, 2, 3]
    assert loop.open is not None and loop.open.tick == 1  # asked for as soon as the first answer was in
    loop.answer()
    step = loop.step()
    assert step.tick == 4 and step.index == 3
    np.testing.assert_array_equal(step.action, np.full(DIMS, 103.0))
    assert loop.control.statistics.seam_jumps[0] == 100.0  # 103 after 3


@given(st.lists(st.integers(0, 14), min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 5))
def test_every_action_sent_is_the_one_of_its_step(latencies: list[int], replan_after: int, reset_every: int) -> None:
    loop = Loop(replan_after=replan_after)
    due: int | None = None
    waits = iter(latencies)
    for count in range(120):
        if reset_every and count % (20 * reset_every) == 19:
            loop.control.reset()
        if loop.open is not None and due is not None and count >= due:
            loop.answer()
            due = None
        epoch, tick = loop.control.epoch, loop.control.tick
        step = loop.step()
        if step.chunk is not None:
            assert step.index is not None and step.tick == tick == step.chunk.tick + step.index
            assert step.chunk.epoch == epoch
            np.testing.assert_array_equal(step.action, np.full(DIMS, 100.0 * step.chunk.tick + step.index))
        if loop.open is not None and due is None:
            due = count + next(waits, 3)
    statistics = loop.control.statistics
    assert statistics.steps == 120
    assert statistics.requests - (loop.open is not None) == statistics.accepted + statistics.discarded.total()


def test_a_request_begins_when_the_chunk_is_old_enough() -> None:
    loop = Loop(replan_after=6)
    loop.step()
    loop.answer(name="first")
    loop.steps(6)
    assert len(loop.requests) == 1
    loop.step()
    request = loop.requests[1]
    assert request.tick == 6 and request.executed == 6
    assert request.previous is not None and request.previous.name == "first"


def test_a_deadline_miss_holds_the_last_command_and_is_counted() -> None:
    loop = Loop(replan_after=H + 1)
    loop.step()
    loop.answer()
    steps = loop.steps(H + 3)
    assert [s.source for s in steps] == ["chunk"] * H + ["hold"] * 3
    for held in steps[H:]:
        np.testing.assert_array_equal(held.action, np.full(DIMS, H - 1.0))
    assert loop.requests[-1].tick == H + 1 and loop.requests[-1].previous is None  # nothing is left to continue
    loop.answer()
    resumed = loop.step()
    assert (resumed.source, resumed.tick, resumed.index) == ("chunk", H + 3, 2)
    assert loop.control.statistics.held == 3 and loop.control.statistics.executed == H + 1


@pytest.mark.parametrize(
    ("hold", "before", "after"),
    [
        ([0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.5]),
        # Two velocities stop, the gripper stays as it is.
        (lambda last: None if last is None else [0.0, 0.0, last[2]], None, [0.0, 0.0, 9.0]),
    ],
)
def test_what_is_held_can_be_given(hold: Any, before: list[float] | None, after: list[float]) -> None:
    loop = Loop(hold=hold, replan_after=H)
    waiting = loop.step()
    assert waiting.action is None if before is None else np.allclose(waiting.action, before)
    loop.answer()
    held = loop.steps(H + 1)[-1]
    assert held.source == "hold" and held.action is not None and held.action.dtype == np.float32
    np.testing.assert_allclose(held.action, after)


def test_a_chunk_of_before_a_reset_is_discarded_and_nothing_of_the_old_episode_is_held() -> None:
    loop = Loop()
    loop.step()
    loop.answer()
    loop.steps(3)
    loop.control.reset()
    step = loop.step()
    assert (step.source, step.action, step.tick) == ("waiting", None, 0)
    loop.answer()  # of the old episode
    assert loop.control.statistics.discarded == {"reset": 1}
    assert loop.step().source == "waiting"
    assert loop.open is not None and loop.open.new_episode and loop.open.previous is None
    loop.answer()
    assert loop.step().index == 0


def test_the_policy_is_told_of_an_episode_until_it_has_answered_in_it() -> None:
    loop = Loop()
    loop.step()
    assert loop.requests[-1].new_episode
    loop.open = None
    loop.control.fail(ValueError("no"))
    loop.step()
    assert loop.requests[-1].new_episode
    loop.answer()
    loop.steps(2)
    assert not loop.requests[-1].new_episode


def test_a_chunk_that_comes_after_all_of_its_steps_is_discarded() -> None:
    loop = Loop(max_chunk_age_s=10, watchdog_s=10)
    loop.step()
    loop.answer()
    loop.steps(2)
    loop.steps(H)  # the second inference takes that long
    loop.answer()
    assert loop.control.statistics.discarded == {"past": 1}
    assert loop.step().source == "hold"


def test_no_action_is_executed_whose_observation_is_too_old() -> None:
    loop = Loop(max_chunk_age_s=0.1, watchdog_s=10)
    loop.step()
    loop.now += 0.2
    loop.answer()
    assert loop.control.statistics.discarded == {"too_old": 1}
    loop.step()
    loop.answer()
    assert [s.source for s in loop.steps(3)] == ["chunk"] * 3
    loop.now += 0.1  # the control loop itself stood still: the second chunk is too old now
    step = loop.step()
    assert step.source == "hold" and loop.control.statistics.overruns == 2


def test_the_age_limit_is_the_chunk_s_own_length_unless_given() -> None:
    loop = Loop(watchdog_s=10)
    loop.step()
    loop.now = H / HZ + 0.001
    loop.answer()
    assert loop.control.statistics.discarded == {"too_old": 1}


def test_the_watchdog_stops_until_reset(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(watchdog_s=0.5)
    loop.step()
    loop.answer()
    with caplog.at_level(logging.ERROR):
        steps = loop.steps(int(0.5 * HZ) + 5)
    assert steps[-1].source == "stopped" and loop.control.state == "stopped"
    np.testing.assert_array_equal(steps[-1].action, np.full(DIMS, H - 1.0))
    assert [r.message.startswith("stopped: no new chunk for") for r in caplog.records] == [True]
    loop.answer()
    assert loop.control.statistics.discarded == {"stopped": 1}
    requests = len(loop.requests)
    assert {s.source for s in loop.steps(10)} == {"stopped"} and len(loop.requests) == requests
    loop.control.reset()
    loop.step()
    loop.answer()
    assert loop.step().source == "chunk"


def test_the_watchdog_is_fed_by_every_new_chunk() -> None:
    loop = Loop(watchdog_s=0.5)
    for _ in range(100):
        loop.step()
        if loop.open is not None:
            loop.answer()
    assert loop.control.state == "running" and loop.control.statistics.executed == 99


def test_the_watchdog_counts_only_while_a_chunk_is_wanted() -> None:
    """A chunk longer than the watchdog's time is executed to where the next one is due."""
    loop = Loop(watchdog_s=0.2, replan_after=30)
    loop.step()
    loop.answer(actions(0, 60))
    assert {s.source for s in loop.steps(31)} == {"chunk"}  # 0.62 s; the last one asked
    assert loop.open is not None and loop.control.state == "running"
    assert [s.source for s in loop.steps(12)][-2:] == ["stopped"] * 2


def test_the_watchdog_also_counts_from_an_episode_s_first_step() -> None:
    loop = Loop(watchdog_s=0.1)
    loop.now = 100.0
    assert [s.source for s in loop.steps(7)][-1] == "stopped"


def test_errors_are_kept_counted_and_logged_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    with caplog.at_level(logging.WARNING):
        for error in (ValueError("first"), ValueError("second"), TimeoutError("third")):
            loop.step()
            loop.open = None
            loop.control.fail(error)
    assert loop.control.statistics.errors == {"ValueError": 2, "TimeoutError": 1}
    assert str(loop.control.last_error) == "third"
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["first", "third"]
    loop.step()
    loop.open = None
    loop.control.fail(ValueError("unreachable"), retry=False)
    loop.steps(3)
    assert loop.open is None  # no observation is taken for a policy that cannot be asked
    loop.control.ready()
    loop.step()
    assert loop.open is not None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.full((H, DIMS), np.nan), "NaN"),
        (np.zeros((0, DIMS)), r"shape \[0, 3\]"),
        (np.zeros(DIMS), r"shape \[3\]"),
        (np.zeros((H, DIMS + 1)), r"shape \[10, 4\], expected \[H, 3\]"),
    ],
)
def test_an_answer_that_cannot_be_executed_is_an_error_and_the_old_chunk_goes_on(given: Any, says: str) -> None:
    loop = Loop()
    loop.step()
    loop.answer()
    loop.steps(2)
    loop.answer(given)
    with pytest.raises(ValueError, match=says):
        assert loop.control.last_error is not None
        raise loop.control.last_error
    assert loop.control.statistics.errors == {"unusable_chunk": 1}
    assert loop.step().index == 2


def test_what_cannot_be_copied_says_so_and_begins_no_inference() -> None:
    control = ChunkControl(control_hz=HZ, hold="last")
    with pytest.raises(TypeError, match="pickle"):
        control.step(0.0, {"state": threading.Lock()})
    assert control.wants_observation() and control.statistics.requests == 0


def test_commands_change_no_faster_than_the_guards_allow_where_another_chunk_takes_over() -> None:
    """The new chunk begins 1.0 away and has steps of 0.05; 0.1 are allowed in the first dimension."""
    loop = Loop(replan_after=2, max_step=[0.1, np.inf, np.inf])
    chunk = np.zeros((H, DIMS), np.float32)
    loop.step()
    loop.answer(chunk)
    loop.steps(3)
    chunk[:] = (1 + 0.05 * np.arange(H))[:, None]
    loop.answer(chunk)
    sent = np.stack([s.action for s in loop.steps(5) if s.action is not None])
    np.testing.assert_allclose(sent[:, 0], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(sent[:, 1:], chunk[1:6, 1:])
    assert loop.control.statistics.limited == 5 and loop.control.statistics.seam_jumps[-1] > 1
    calm = Loop(max_step=[0.1] * DIMS)
    calm.step()
    calm.answer(0.1 * np.arange(H, dtype=np.float32)[:, None] * np.ones((1, DIMS), np.float32))
    steps = calm.steps(H)
    assert [s.index for s in steps] == list(range(H)) and calm.control.statistics.limited == 0


def test_a_chunk_of_another_width_than_the_guards_is_refused() -> None:
    loop = Loop(max_step=np.ones(DIMS + 1))
    loop.step()
    loop.answer()
    assert loop.control.statistics.errors == {"unusable_chunk": 1}


def test_an_observation_is_copied_and_actions_are_copies() -> None:
    frame = np.zeros(4, np.uint8)
    control = ChunkControl(control_hz=HZ, hold="last")
    _, request = control.step(0.0, {"images": {"cam": frame}})
    frame[:] = 255
    assert request is not None and request.observation["images"]["cam"].max() == 0
    control.finish(request, Answer(actions(0)), 0.01)
    step, _ = control.step(0.02)
    assert step.action is not None and step.chunk is not None
    step.action[:] = 7
    assert step.chunk.actions[0, 0] == 0


def test_the_delay_comes_from_measured_latencies_without_the_first() -> None:
    loop = Loop(replan_after=3, watchdog_s=10)
    loop.step()
    loop.now += 3.0 - 1 / HZ
    loop.answer(actions(0, 400))  # seconds of warming up
    for latency in (5, 3):
        while loop.open is None:
            loop.step()
        assert loop.open.delay == (0 if latency == 5 else 5)
        loop.steps(latency - 1)
        loop.answer()
    while loop.open is None:
        loop.step()
    assert loop.open.delay == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"control_hz": 0}, "control_hz is 0"),
        ({"replan_after": 0}, "replan_after is 0"),
        ({"max_chunk_age_s": -1.0}, "max_chunk_age_s is -1.0"),
        ({"watchdog_s": float("nan")}, "watchdog_s is nan"),
        ({"hold": "zero"}, "hold is 'zero'"),
        ({"hold": np.zeros(7), "max_step": np.ones(3)}, "hold has 7 numbers, expected 3"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ChunkControl(**{"control_hz": HZ, "hold": "last", **options})

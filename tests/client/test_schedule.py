"""Chunks by time stamp: whatever arrives in whatever order, an action is executed in its own control step or never."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_engine.client.schedule import Chunk, Schedule

PERIOD = 0.02


def chunk(tick: int, length: int = 5, *, epoch: int = 0, expires_at: float = 1e9) -> Chunk:
    """Each action says whose it is: (tick of the observation, its index)."""
    actions = np.array([[tick, index] for index in range(length)], np.float32)
    return Chunk(actions, tick, expires_at, epoch)


@dataclass(frozen=True)
class Arrival:
    """A chunk on its way: asked for in control step ``asked``, there ``late`` steps later."""

    asked: int
    late: int
    length: int
    age_steps: float


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        asked=st.integers(0, 40),
        late=st.integers(0, 15),
        length=st.integers(1, 12),
        age_steps=st.floats(0.5, 20),
    ),
    max_size=12,
)


@settings(max_examples=200)
@given(ARRIVALS, st.sets(st.integers(0, 60), max_size=4))
def test_an_action_is_executed_in_its_own_step_or_never(arrivals: list[Arrival], resets: set[int]) -> None:
    schedule = Schedule()
    asked: list[tuple[int, Chunk]] = []  # when it arrives, what
    executed_of: list[Chunk] = []
    for tick in range(60):
        now = tick * PERIOD
        if tick in resets:
            schedule.reset()
        for arrival in arrivals:
            if arrival.asked == tick:
                expires_at = now + arrival.age_steps * PERIOD
                asked.append(
                    (tick + arrival.late, chunk(tick, arrival.length, epoch=schedule.epoch, expires_at=expires_at))
                )
        for there, candidate in asked:
            if there == tick:
                before = schedule.chunk
                refused = schedule.offer(candidate, tick, now)
                assert schedule.chunk is (before if refused else candidate)
        index = schedule.index(tick, now)
        if index is None:
            continue
        executing = schedule.chunk
        assert executing is not None
        assert index == tick - executing.tick, "an action is executed in another step than its own"
        assert 0 <= index < len(executing), "beyond the horizon"
        assert executing.epoch == schedule.epoch, "from before a reset"
        assert now <= executing.expires_at, "its observation is too old"
        assert any(there <= tick and executing is candidate for there, candidate in asked), "before it arrived"
        if executed_of and executed_of[-1].epoch == executing.epoch:
            assert executing.tick >= executed_of[-1].tick, "back to an older plan"
        executed_of.append(executing)


@settings(max_examples=300)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 4), st.booleans(), st.sampled_from([0.4, 0.5, 0.6]))
def test_a_chunk_takes_over_exactly_if_it_may(tick: int, now_tick: int, length: int, reset: bool, now: float) -> None:
    schedule = Schedule()
    assert schedule.offer(chunk(3), 3, 0.0) is None
    if reset:
        schedule.reset()
    candidate = chunk(tick, length, expires_at=0.5)
    reason = schedule.offer(candidate, now_tick, now)
    if reset:
        assert reason == "reset"
    elif tick <= 3:
        assert reason == "superseded"
    elif now > 0.5:
        assert reason == "too_old"
    elif now_tick - tick >= length:
        assert reason == "past"
    else:
        assert reason is None and schedule.chunk is candidate


def test_actions_of_steps_gone_by_are_dropped_at_the_splice() -> None:
    schedule = Schedule()
    schedule.offer(chunk(0), 0, 0.0)
    assert [schedule.index(tick, 0.0) for tick in range(3)] == [0, 1, 2]
    schedule.offer(chunk(1), 3, 0.0)
    assert [schedule.index(tick, 0.0) for tick in range(3, 8)] == [2, 3, 4, None, None]


def test_nothing_is_executed_before_its_step_or_without_a_chunk() -> None:
    schedule = Schedule()
    assert schedule.index(0, 0.0) is None
    schedule.offer(chunk(4), 4, 0.0)
    assert schedule.index(3, 0.0) is None

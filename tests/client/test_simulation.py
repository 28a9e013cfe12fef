"""Control loops in virtual time around a real policy: what asynchrony and real-time chunking are worth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0_engine.cli import main
from pi0_engine.client.simulation import Conditions, Run, Strategy, simulate

#: Six control steps of latency, give or take two.
ROUGH = Conditions(latency_ms=120.0, jitter_ms=40.0, drop=0.1, seconds=3.0, seed=1)
STRATEGIES: tuple[Strategy, ...] = ("synchronous", "asynchronous", "real-time chunking")


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {strategy: simulate(strategy, ROUGH) for strategy in STRATEGIES}


def test_the_background_takes_the_waiting_away(runs: dict[str, Run]) -> None:
    first_chunk = round(ROUGH.latency_ms * ROUGH.control_hz / 1e3)
    assert runs["synchronous"].held.sum() > 4 * first_chunk
    for name in STRATEGIES[1:]:
        held = np.flatnonzero(runs[name].held)
        assert first_chunk - 2 <= len(held) <= first_chunk + 2, "chunks of a second bridge a lost answer"
        np.testing.assert_array_equal(held, np.arange(len(held)))  # before the first chunk only


def test_real_time_chunking_takes_the_jumps_away(runs: dict[str, Run]) -> None:
    plain, chunking = runs["asynchronous"], runs["real-time chunking"]
    np.testing.assert_array_equal(plain.seams, chunking.seams)  # the same latencies, the same losses
    assert len(plain.seams) > 10
    assert chunking.jumps.mean() < 0.4 * plain.jumps.mean()
    assert chunking.summary()["largest_step"] < plain.summary()["largest_step"], "the jumps are elsewhere"


def test_nothing_stale_is_executed_and_nothing_late_but_the_first_chunk(runs: dict[str, Run]) -> None:
    assert all(run.stale == 0 for run in runs.values())
    # A loop that waits executes every action as much later as its chunk took; at least its shortest latency.
    assert runs["synchronous"].late_s.min() >= 1e-3 * (ROUGH.latency_ms - ROUGH.jitter_ms) - 1e-9
    for name in STRATEGIES[1:]:
        run = runs[name]
        executed = np.flatnonzero(~run.held)
        np.testing.assert_allclose(run.late_s[executed >= run.seams[0]], 0, atol=1e-9)


def test_a_run_depends_on_its_seed_alone(runs: dict[str, Run]) -> None:
    again = simulate("asynchronous", ROUGH)
    np.testing.assert_array_equal(again.commands, runs["asynchronous"].commands)
    other = simulate("asynchronous", dataclasses.replace(ROUGH, seed=2))
    assert not np.array_equal(other.commands, again.commands)


def test_without_latency_nothing_is_held() -> None:
    ideal = Conditions(latency_ms=0.0, jitter_ms=0.0, drop=0.0, seconds=0.5, execute=10)
    run = simulate("synchronous", ideal)
    assert not run.held.any() and run.seams.tolist() == [10, 20] and run.inferences == 3
    assert simulate("asynchronous", ideal).held.sum() == 1  # an answer is taken at the next control step


def test_a_robot_that_never_gets_an_answer_gets_no_command() -> None:
    for strategy in STRATEGIES[:2]:
        run = simulate(strategy, Conditions(drop=1.0, seconds=1.0))
        assert run.held.all() and np.isnan(run.commands).all() and run.inferences > 3
        assert run.summary()["largest_step"] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latency_ms": -1.0}, "latency_ms is -1.0"),
        ({"jitter_ms": float("inf")}, "jitter_ms is inf"),
        ({"drop": 1.5}, "drop is 1.5"),
        ({"control_hz": 0.0}, "control_hz is 0.0"),
        ({"execute": 51}, "execute is 51"),
    ],
)
def test_conditions_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Conditions(**changes)


SHORT = ["simulate", "--seconds", "1", "--latency-ms", "100", "--jitter-ms", "20", "--seed", "3"]


def test_the_command_prints_what_was_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are the extra 'plot'")
    assert main([*SHORT, "--plot", str(tmp_path / "seams.png"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (tmp_path / "seams.png").stat().st_size > 10_000
    assert result["conditions"]["latency_ms"] == 100 and list(result["loops"]) == list(STRATEGIES)
    conditions = Conditions(seconds=1.0, latency_ms=100.0, jitter_ms=20.0, seed=3)
    assert result["loops"]["real-time chunking"] == simulate("real-time chunking", conditions).summary()


def test_the_command_without_real_time_chunking(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--rtc", "off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["synchronous", "asynchronous"]
    assert main([*SHORT, "--drop", "2"]) == 2
    assert "drop is 2.0" in capsys.readouterr().err

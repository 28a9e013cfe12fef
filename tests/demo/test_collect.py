"""Demonstrations: reproducible by seed, complete chunks, segments that end where the arm was pushed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from pi0_engine.demo.collect import _MOST_EPISODES, FIRST_UNSEEN_SEED, STRIDE, _jobs, collect_episode, main
from pi0_engine.demo.dataset import Demonstrations
from pi0_engine.demo.scene import Scene
from tests.support.simulator import needs_simulator


def made_up(observations: int, seed: int) -> Demonstrations:
    rng = np.random.default_rng(seed)
    actions = rng.standard_normal((2 * observations, 4), dtype=np.float32)
    return Demonstrations(
        frames=rng.integers(0, 256, (observations, 2, 4, 4, 3), dtype=np.uint8),
        states=rng.standard_normal((observations, 4), dtype=np.float32),
        actions=actions,
        first=np.arange(0, 2 * observations, 2),
        end=np.full(observations, 2 * observations),
    )


def test_chunks_end_with_their_segment(tmp_path: Path) -> None:
    one, two = made_up(5, 0), made_up(3, 1)
    Demonstrations.join([one, two]).save(tmp_path / "both.safetensors")
    both = Demonstrations.load(tmp_path / "both.safetensors")
    assert len(both) == 8
    chunks, there = both.chunks(np.array([4, 5, 7]), 4)
    assert there.tolist() == [[True, True, False, False], [True] * 4, [True, True, False, False]]
    np.testing.assert_array_equal(chunks[0], one.actions[[8, 9, 9, 9]])
    np.testing.assert_array_equal(chunks[1], two.actions[:4])
    np.testing.assert_array_equal(chunks[2], two.actions[[4, 5, 5, 5]])
    np.testing.assert_array_equal(both.frames[5:], two.frames)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold demonstrations"):
        Demonstrations.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="does not hold demonstrations"):
        Demonstrations.load(tmp_path / "text.safetensors")


@needs_simulator
def test_an_episode_is_decided_by_its_seed() -> None:
    with Scene("handle-press") as scene:
        once, again, other = (collect_episode(scene, "noisy", seed) for seed in (1, 1, 2))
    assert once is not None and again is not None and other is not None
    for name in ("frames", "states", "actions", "first", "end"):
        np.testing.assert_array_equal(getattr(once, name), getattr(again, name))
    assert once.actions.shape != other.actions.shape or (once.actions != other.actions).any()
    assert len(once) == -(-len(once.actions) // STRIDE) and (once.first < once.end).all()
    assert np.abs(once.actions).max() <= 1, "the expert's own actions, without the noise"


@needs_simulator
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path), "--tasks", "handle-press", "--episodes", "2", "--processes", "1"]
    assert main(command) == 0
    files = {path.name: Demonstrations.load(path) for path in tmp_path.iterdir()}
    assert set(files) == {"handle-press-noisy.safetensors", "handle-press-clean.safetensors"}
    assert main([*command, "--tasks", "juggle"]) == 2
    assert "task 'juggle' is none of" in capsys.readouterr().err
    assert main([*command, "--episodes", "0"]) == 2
    assert "episodes is 0" in capsys.readouterr().err


def test_no_two_demonstrations_share_a_scene_and_none_is_evaluated() -> None:
    most = 2 * _MOST_EPISODES + 10  # of the largest collection
    jobs = [_jobs("reach", style, seed, most) for style in ("noisy", "clean") for seed in (0, 1, 99)]
    seeds = [job.seed for job in itertools.chain.from_iterable(jobs)]
    assert len(set(seeds)) == len(seeds) == 6 * most and max(seeds) < FIRST_UNSEEN_SEED

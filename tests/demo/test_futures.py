"""Several futures: both ways around the pillar are drawn, and between them there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi0_engine.config import EngineConfig
from pi0_engine.demo.collect import FIRST_UNSEEN_SEED
from pi0_engine.demo.futures import Walk, main, plot, walk
from pi0_engine.demo.scene import Scene
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.policy import Pi0Policy
from tests.support import binomial
from tests.support.simulator import needs_simulator


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    return Pi0Policy.from_checkpoint(CHECKPOINT, robot="metaworld", engine=EngineConfig(dtype="float32"))


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene("go-around") as opened:
        yield opened


@needs_simulator
def test_one_look_draws_both_modes(policy: Pi0Policy, scene: Scene) -> None:
    """Sideways motion within the first chunk, in centimetres of commanded way: 30 of 64 go left, 34 right, 13 each."""
    seen = scene.reset(FIRST_UNSEEN_SEED)
    actions = policy.infer(seen, seed=0, num_samples=64)["actions"]
    sideways = actions[:, :, 0].sum(axis=1)
    left, right = (sideways < -3).sum(), (sideways > 3).sum()
    assert left >= 13 and right >= 13 and left + right >= 58, np.sort(sideways).round(1).tolist()
    assert abs(sideways.mean()) < 0.5 * np.abs(sideways).mean(), "the mean of the samples is none of them"


@needs_simulator
def test_samples_go_around_and_their_mean_runs_into_the_pillar(policy: Pi0Policy, scene: Scene) -> None:
    """Of 60 walks by samples all passed, of 46 by means 38 touched it; which side is taken, the first chunk decides."""
    samples = [walk(scene, policy, FIRST_UNSEEN_SEED, noise_seed=number) for number in range(8)]
    assert sum(one.passed for one in samples) >= binomial.least(8, binomial.low(60, 60)) == 4
    assert {one.side for one in samples if one.passed} == {-1, 1}
    means = [walk(scene, policy, FIRST_UNSEEN_SEED, driver="mean", noise_seed=number) for number in range(8)]
    assert sum(one.touched for one in means) >= binomial.least(8, binomial.low(38, 46)) == 1


def test_the_picture(tmp_path: Path) -> None:
    way = np.linspace([0.0, 0.6, 0.2], [0.15, 0.9, 0.2], 20)
    walks = [Walk(way, False), Walk(way * [-1, 1, 1], False), Walk(way[:5] * [0, 1, 1], True), Walk(way[:9], False)]
    assert [one.side for one in walks] == [1, -1, 0, 1]
    assert [one.passed for one in walks] == [True, True, False, False]
    plot(walks[:2], walks[2:], tmp_path / "futures.png")
    assert (tmp_path / "futures.png").stat().st_size > 5000


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out.png"), "--checkpoint", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_named_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--checkpoint", str(tmp_path / "none")]
    assert main([str(tmp_path / "no" / "out.png"), *nowhere]) == 2
    assert "out.png' cannot be written (No such file" in capsys.readouterr().err
    assert main([str(tmp_path / "out.gif"), *nowhere]) == 2
    assert "out.gif', expected one of .png, .svg, .pdf" in capsys.readouterr().err
    assert main([str(tmp_path / "out.png"), *nowhere, "--walks", "0"]) == 2
    assert "walks is 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""``pi0-engine demo`` as a user runs it: with the simulator, without it, and with what it cannot do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from pi0_engine.cli import main
from pi0_engine.commands.demo import find_instruction
from pi0_engine.demo import futures, report, train
from pi0_engine.demo.collect import FIRST_UNSEEN_SEED
from pi0_engine.demo.film import Film
from pi0_engine.demo.recorded import recorded_observation
from pi0_engine.demo.scene import CAMERAS, Scene
from pi0_engine.demo.tasks import TASKS
from tests.support.simulator import needs_simulator
from tests.support.trained import write_untrained


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_untrained(tmp_path_factory.mktemp("untrained")))


def parity(text: str) -> float:
    found = re.search(r"^parity +relative L2 (\S+) against", text, re.MULTILINE)
    assert found, text
    return float(found[1])


@needs_simulator
def test_a_policy_that_fails_is_shown_and_is_status_1(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = tmp_path / "out.gif"
    arguments = ["--checkpoint", untrained, "--dtype", "float32", "--output", str(film), "--execute", "16"]
    assert main(["demo", "--instruction", "Turn on the  water.", *arguments]) == 1
    text = capsys.readouterr().out
    assert '"turn on the water" (task faucet-open, scene 0)' in text
    assert parity(text) <= 2e-5
    assert re.findall(r"^step +(\d+) ", text, re.MULTILINE) == [str(step) for step in range(0, 200, 16)]
    assert "failure      after 200 control steps (2.5 s) and 13 chunks" in text
    assert re.search(r"^flow +\d", text, re.MULTILINE)
    with Image.open(film) as image:
        assert image.n_frames == 100 and image.info["loop"] == 0  # type: ignore[attr-defined]
    with Image.open(film.with_suffix(".png")) as image:
        assert image.size[0] > 1000


@needs_simulator
def test_the_shipped_policy_does_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scene away from the edge: with noise of 1e-2 in every action 40 of 40 episodes succeed, in 89 to 92 steps."""
    assert main(["demo", "--output", str(tmp_path / "demo.gif")]) == 0
    assert re.search(r"^success +after \d+ control steps", capsys.readouterr().out, re.MULTILINE)


def test_without_the_simulator_a_recorded_observation_is_answered(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)  # as if it were not installed
    film = tmp_path / "demo.gif"
    arguments = ["--checkpoint", untrained, "--dtype", "float32", "--output", str(film)]
    assert main(["demo", "--prompt", "close the faucet", *arguments]) == 0
    text = capsys.readouterr().out
    assert "the simulator needs metaworld: pip install 'pi0-engine[sim]'" in text
    assert "A recorded observation is answered instead; nothing moves." in text
    assert parity(text) <= 2e-5 and "success" not in text and re.search(r"^infer +\d", text, re.MULTILINE)
    assert film.with_suffix(".png").is_file() and not film.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "make tea"], "not trained to 'make tea', expected one of\n  reach the ball; "),
        (["--output", "demo.avi"], "'demo.avi', expected a .gif or .mp4"),
        (["--execute", "0"], "execute is 0"),
        (["--output", "no/such/folder/demo.gif"], "'no/such/folder/demo.gif' cannot be written (No such file"),
        (["--seed", "-1"], "seed is -1, expected at least 0"),
        (["--execute", "17"], "16 actions of a chunk"),
        (["--checkpoint", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_the_demo_cannot_do(
    arguments: list[str],
    message: str,
    untrained: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    assert main(["demo", "--checkpoint", untrained, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_simulator
def test_an_mp4_shows_every_second_step_and_stays_on_the_last(tmp_path: Path) -> None:
    film = Film(tmp_path / "film.mp4")
    with Scene("reach") as scene:
        film.look(scene.reset(0))
        for _ in range(4):
            scene.step(np.zeros(4))
            film.add(scene)
    film.save()
    frames = iio.imread(film.path)
    assert frames.shape == (2 + 20, 260, 440, 3) and frames.std() > 20
    assert iio.immeta(film.path)["fps"] == 20


def test_a_film_or_plot_that_cannot_be_written_is_named_first(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in (".gif", ".png"):
        folder = tmp_path / kind[1:]
        (folder / f"demo{kind}").mkdir(parents=True)
        assert main(["demo", "--checkpoint", untrained, "--output", str(folder / "demo.gif")]) == 2
        said = capsys.readouterr()
        assert f"demo{kind}' cannot be written (Is a directory)" in said.err and said.out == ""
    (tmp_path / "old.gif").write_bytes(b"a film")
    assert Film(tmp_path / "old.gif").path.read_bytes() == b"a film"


def test_without_matplotlib_nothing_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    nowhere = str(tmp_path / "nowhere")
    for run in (
        lambda: main(["demo", "--checkpoint", nowhere, "--output", str(tmp_path / "demo.gif")]),
        lambda: futures.main([str(tmp_path / "futures.png"), "--checkpoint", nowhere]),
        lambda: train.main([nowhere, str(tmp_path / "run")]),
        lambda: report.main(["--docs", nowhere]),
    ):
        assert run() == 2
        said = capsys.readouterr()
        assert "a plot needs matplotlib: pip install 'pi0-engine[plot]'" in said.err and said.out == ""
    assert not list(tmp_path.iterdir())


def test_an_mp4_names_the_encoder_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"imageio_ffmpeg: pip install 'imageio\[ffmpeg\]'"):
        Film("demo.mp4")


def test_every_instruction_belongs_to_one_task() -> None:
    for name, task in TASKS.items():
        for prompt in task.prompts:
            assert find_instruction(f" {prompt.upper()}. ") == (name, prompt)


@pytest.mark.parametrize("task", TASKS)
def test_there_is_a_recorded_observation_of_every_task(task: str) -> None:
    recorded = recorded_observation(task)
    assert recorded["prompt"] == TASKS[task].prompts[0]
    assert {recorded[camera].shape for camera in CAMERAS} == {(64, 64, 3)}
    assert recorded["observation/state"].shape == (4,) and all(recorded[camera].std() > 20 for camera in CAMERAS)


@needs_simulator
@pytest.mark.parametrize("task", ["faucet-open", "reach"])
def test_a_recorded_observation_is_what_the_scene_shows(task: str) -> None:
    """To a few grey values: renderers differ."""
    with Scene(task) as scene:
        seen = scene.reset(FIRST_UNSEEN_SEED)
    recorded = recorded_observation(task)
    np.testing.assert_allclose(recorded["observation/state"], seen["observation/state"], atol=1e-6)
    for camera in CAMERAS:
        assert np.abs(recorded[camera].astype(float) - seen[camera]).mean() < 3

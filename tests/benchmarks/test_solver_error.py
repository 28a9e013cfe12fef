"""The solvers' error over network calls, on small models: what is measured, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import solver_error
from pi0_engine.config import ModelType
from pi0_engine.engine.solvers import CALLS_PER_STEP
from solver_error import EXACT_STEPS, main, measure, read_observation, table
from tests.support.models import MODEL_TYPES, random_inputs, random_noise, reference_actions, rel_l2, smooth_in_time
from tests.support.paths import DATA

GOLDEN = DATA / "golden"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_errors_are_those_of_the_reference(model_type: ModelType) -> None:
    """Each number again, by the reference's own sampling; two observations of different lengths, two chunks each."""
    model = smooth_in_time(model_type)
    inputs = random_inputs(model.config, [[True, True, True], [False, True, False]], [5, 3])
    noise = random_noise(model.config, 2, samples=2)
    report = measure(model, inputs, noise, most_calls=4, action_dims=5)
    exact = reference_actions(model, inputs, noise, EXACT_STEPS, "midpoint")[..., :5]
    for solver, calls_per_step in CALLS_PER_STEP.items():
        row = report["solvers"][solver]
        assert row["num_steps"] == [n for n in (1, 2, 3, 4) if n * calls_per_step <= 4]
        assert row["calls"] == [n * calls_per_step for n in row["num_steps"]]
        for n, mean, largest in zip(row["num_steps"], row["rel_l2_mean"], row["rel_l2_max"], strict=True):
            found = reference_actions(model, inputs, noise, n, solver)[..., :5]
            errors = [rel_l2(found[b, s], exact[b, s]) for b in (0, 1) for s in (0, 1)]
            assert mean == pytest.approx(np.mean(errors), rel=1e-2)
            assert largest == pytest.approx(max(errors), rel=1e-2)
    assert (report["chunks"], report["observations"], report["action_dims"]) == (4, 2, 5)


def test_second_order_pays_where_the_flow_is_smooth() -> None:
    model = smooth_in_time("pi05")
    report = measure(model, random_inputs(model.config), random_noise(model.config), most_calls=20)
    at_20 = {solver: row["rel_l2_mean"][-1] for solver, row in report["solvers"].items()}
    assert all(row["calls"][-1] == 20 for row in report["solvers"].values())
    assert max(at_20["midpoint"], at_20["adams_bashforth"]) < at_20["euler"] / 5
    exact = report["exact"]
    # Euler's 200 steps are off by a tenth of its 20: they would hide what is to be seen.
    assert exact["euler_rel_l2"] == pytest.approx(at_20["euler"] / 10, rel=0.1)
    assert exact["own_rel_l2"] < min(at_20.values()) / 50
    lines = table(report).splitlines()
    assert len(lines) == 21 and lines[1].split()[2] == "-" and lines[-1].split()[0] == "20"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.zeros(2, 1, 5, 7)}, r"noise is \[2, 1, 5, 7\], expected \[1, samples, H, 7\]"),
        ({"noise": torch.zeros(1, 5, 7)}, r"noise is \[1, 5, 7\]"),
        ({"action_dims": 8}, "action_dims is 8, expected 1 to 7"),
        ({"most_calls": 0}, "most_calls is 0, expected 1 to 100"),
    ],
)
def test_what_cannot_be_measured_is_named(changes: dict[str, object], message: str) -> None:
    model = smooth_in_time("pi0")
    arguments = {"inputs": random_inputs(model.config), "noise": random_noise(model.config), **changes}
    with pytest.raises(ValueError, match=message):
        measure(model, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes does not depend on how exact it is."""
    monkeypatch.setattr(solver_error, "EXACT_STEPS", 8)


RANDOM = ["--random-weights", "0", "--config", str(GOLDEN / "pi0_tiny.json"), "--samples", "1", "--most-calls", "4"]


@pytest.mark.usefixtures("few_steps")
def test_a_case_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "v1.2"
    case = str(GOLDEN / "pi0_tiny_c09_only_cam1_h10_s4.npz")
    assert main([*RANDOM, "--case", case, "--output", str(output)]) == 0
    report = json.loads((tmp_path / "new" / "v1.2.json").read_text())
    assert report["kind"] == "solver_error" and report["source"] == "random weights 0"
    assert report["solvers"]["midpoint"]["calls"] == [2, 4] and report["action_dims"] == 32
    with Image.open(tmp_path / "new" / "v1.2.png") as picture:
        assert picture.size[0] > 500
    assert "relative L2 from 8 steps of midpoint, mean of 1 chunks" in capsys.readouterr().out


@pytest.mark.usefixtures("few_steps")
def test_observations_from_the_command_line(tmp_path: Path) -> None:
    """The robot's dimensions count, not the network's padding."""
    random = np.random.default_rng(0)
    files = []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.npz"))
        arrays = {
            "observation/image": random.integers(0, 256, (40, 40, 3), dtype=np.uint8),
            "observation/wrist_image": random.integers(0, 256, (40, 40, 3), dtype=np.uint8),
            "observation/state": random.uniform(-1, 1, 8),
            "prompt": np.array("pick up the bowl"),
        }
        np.savez(files[-1], **arrays)  # type: ignore[arg-type]
    assert read_observation(files[0])["prompt"] == "pick up the bowl"
    arguments = ["--robot", "libero", "--observation", *files, "--output", str(tmp_path / "out")]
    assert main([*RANDOM, *arguments]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["observations"], report["chunks"], report["action_dims"]) == (2, 2, 7)


def test_the_demo_brings_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_error, "EXACT_STEPS", 10)  # 200 of them take 40 s
    assert main(["--demo", "--samples", "1", "--most-calls", "2", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["observations"], report["chunks"], report["action_dims"]) == (10, 10, 4)
    assert report["source"] == "the demo's checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --demo, or --case FILE, or --robot NAME and --observation FILE..."),
        (["--demo", "--robot", "libero"], "--demo brings its checkpoint, robot and observations"),
        (["--robot", "libero"], "expected either --demo"),
        (["--observation", "a.npz"], "expected either --demo"),
        (["--case", "absent.npz"], "there is no case file absent.npz"),
        (["--robot", "libero", "--observation", "absent.npz"], "observation absent.npz is not an .npz of arrays"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RANDOM, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""

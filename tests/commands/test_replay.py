"""``pi0-engine replay``: the same policy answers what was recorded, another one does not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.cli import main
from pi0_engine.client import ChunkRunner
from pi0_engine.commands.replay import default_tolerance
from pi0_engine.config import EngineConfig, GemmaConfig, Pi0Config, SiglipConfig, SolverName
from pi0_engine.policy import Pi0Policy, SubtaskPlanner
from pi0_engine.recording.files import Record, Recording
from pi0_engine.recording.recorder import Recorder, RecordingPolicy, describe_policy
from pi0_engine.robots.guards import check
from pi0_engine.robots.normalization import NormStats
from pi0_engine.rtc.schedule import Leftover, RtcConfig
from pi0_engine.text.files import demo_tokenizer

SEED = 4
#: Runs in milliseconds: 4 patches per camera, and as many words as the demo's tokenizer has.
MODEL = Pi0Config(
    "pi0",
    vision=SiglipConfig(width=36, depth=2, num_heads=3, mlp_dim=52, image_size=28),
    llm=GemmaConfig(40, 2, 56, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=2048),
    expert=GemmaConfig(28, 2, 44, num_heads=4, num_kv_heads=1, head_dim=16),
)


def observation(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "observation/image": random.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        "observation": {"wrist_image": random.integers(0, 256, (64, 48, 3), dtype=np.uint8)},
        "observation/state": random.uniform(-1, 1, 8),
        "prompt": ["pick up the bowl", "open the drawer"][seed % 2],
    }


@pytest.fixture(scope="module")
def robot_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("robots") / "guarded.yaml"
    path.write_text("extends: libero\ncontrol_hz: 10\nguards: {on_violation: clip, limits: [-0.25, 0.25]}\n")
    return path


def make_policy(
    robot: str | Path,
    dtype: str = "float32",
    seed: int | None = None,
    rtc: RtcConfig | None = None,
    solver: SolverName = "euler",
) -> Pi0Policy:
    return Pi0Policy.from_checkpoint(
        RandomCheckpoint(MODEL, SEED),
        robot=robot,
        config=MODEL,
        engine=EngineConfig(dtype=dtype, solver=solver),  # type: ignore[arg-type]
        tokenizer=demo_tokenizer(),
        norm_stats=NormStats.identity(),
        seed=seed,
        rtc=rtc or RtcConfig(),
    )


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    return make_policy("libero")


@pytest.fixture(scope="module")
def recording(policy: Pi0Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four inferences: plain, by seed, of several samples, and with another prompt and number of steps."""
    directory = tmp_path_factory.mktemp("recording")
    with Recorder(directory, describe_policy(policy, random_weights=SEED)) as recorder:
        recorded = RecordingPolicy(policy, recorder, seed=7)
        recorded.infer(observation(0))
        recorder.write(Record(observation(1), policy.infer(observation(1), seed=3), seed=3, latency_ms=12.0, time=2.0))
        recorded.infer(observation(2), num_samples=2)
        recorded.infer(observation(3), prompt="wave", num_steps=2)
    return directory


def replay(capsys: pytest.CaptureFixture[str], *arguments: str | Path, expect: int = 0) -> dict[str, Any]:
    assert main(["replay", *map(str, arguments), "--json"]) == expect
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# --- the same policy -----------------------------------------------------------------------------------------------


def test_the_recorded_policy_repeats_to_the_bit(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = replay(capsys, recording)
    assert result["passed"] and result["max_rel_l2"] == 0 and result["tolerance"] == 1e-6
    assert (result["compared"], result["wrong"], result["unanswered"], result["skipped"]) == (4, 0, 0, [])
    assert [row["record"] for row in result["rows"]] == [f"segment-000001/{n:06d}" for n in (1, 2, 3, 4)]
    assert all(row["max_abs"] == 0 and row["recorded_ms"] > 0 and row["replayed_ms"] > 0 for row in result["rows"])


def test_the_recorded_solver_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording that does not name one is older than the choice: Euler's."""
    recorded = make_policy("libero", solver="midpoint")
    with Recorder(tmp_path, describe_policy(recorded, random_weights=SEED)) as recorder:
        RecordingPolicy(recorded, recorder, seed=7).infer(observation(0))
    assert replay(capsys, tmp_path)["max_rel_l2"] == 0
    described = json.loads((tmp_path / "recording.json").read_text())
    assert described["engine"].pop("solver") == "midpoint"
    (tmp_path / "recording.json").write_text(json.dumps(described))
    assert replay(capsys, tmp_path, expect=1)["max_rel_l2"] > 1e-4


def test_a_recording_policy_answers_as_the_policy_does(policy: Pi0Policy, recording: Path, tmp_path: Path) -> None:
    first = next(iter(Recording(recording)))
    expected = make_policy("libero", seed=7)
    np.testing.assert_array_equal(first.reply["actions"], expected.infer(observation(0))["actions"])
    with Recorder(tmp_path, describe_policy(policy)) as recorder:
        recorded = RecordingPolicy(policy, recorder)
        given = recorded.infer(observation(0), seed=5)["actions"]
        np.testing.assert_array_equal(given, policy.infer(observation(0), seed=5)["actions"])
        with pytest.raises(ValueError, match="both noise and seed"):
            recorded.infer(observation(0), seed=5, noise=np.zeros((50, 32)))
        with pytest.raises(ValueError, match="one by one"):
            recorded.infer([observation(0)])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is missing"):
            recorded.infer({})
        assert recorder.written + recorder.dropped <= 1  # what raised is not recorded


def test_the_instruction_of_a_planner_is_recorded(policy: Pi0Policy, tmp_path: Path) -> None:
    planned = make_policy("libero")
    planned.subtask = SubtaskPlanner(lambda _: "open the drawer", period_s=0)
    with Recorder(tmp_path, describe_policy(planned)) as recorder:
        reply = RecordingPolicy(planned, recorder).infer(observation(0))
    (record,) = Recording(tmp_path)
    assert record.prompt == "open the drawer"
    again = policy.infer(observation(0), prompt="open the drawer", noise=record.noise)
    np.testing.assert_array_equal(again["actions"], reply["actions"])


def test_a_control_loop_runs_on_a_recording_policy(tmp_path: Path) -> None:
    """Its episodes too: each begins with a reset, and the planner is asked anew."""
    planned, subtasks = make_policy("libero"), iter(["open the drawer", "pick up the bowl"])
    planned.subtask = SubtaskPlanner(lambda _: next(subtasks), period_s=1e6)
    with Recorder(tmp_path, describe_policy(planned)) as recorder:
        recorded = RecordingPolicy(planned, recorder)
        with ChunkRunner(recorded, control_hz=10, hold="last", max_chunk_age_s=1e6, watchdog_s=1e6) as runner:
            for _ in range(2):
                runner.reset()
                end = time.monotonic() + 120
                while runner.state != "running" and runner.last_error is None and time.monotonic() < end:
                    runner.step(observation(0))
                    time.sleep(0.01)
                assert runner.state == "running", runner.last_error
    instructions = [record.prompt for record in Recording(tmp_path)]
    assert instructions[0] == "open the drawer" and instructions[-1] == "pick up the bowl"


def test_bfloat16_repeats_to_the_bit_and_float32_is_near_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounded = make_policy("libero", "bfloat16")
    with Recorder(tmp_path, describe_policy(rounded, random_weights=SEED)) as recorder:
        RecordingPolicy(rounded, recorder, seed=0).infer(observation(0))
    assert replay(capsys, tmp_path)["max_rel_l2"] == 0
    other = replay(capsys, tmp_path, "--dtype", "float32")
    assert 1e-4 < other["max_rel_l2"] < other["tolerance"] == 0.02
    strict = replay(capsys, tmp_path, "--dtype", "float32", "--tolerance", "1e-4", expect=1)
    assert not strict["passed"] and strict["tolerance_reason"] == "as given"


def test_guards_are_applied_again(robot_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded = make_policy(robot_file)
    robot = guarded.transform.robot
    with Recorder(tmp_path, describe_policy(guarded, random_weights=SEED)) as recorder:
        reply = guarded.infer(observation(0), seed=1)
        report = check(reply["actions"], reply["state"], robot.guards, robot.control_hz)
        assert report.applied == "clip"
        guarded_reply = {**reply, "actions": report.actions, "guards": report.to_dict()}
        recorder.write(Record(observation(0), guarded_reply, seed=1))
    assert replay(capsys, tmp_path)["max_rel_l2"] == 0
    assert replay(capsys, tmp_path, "--robot", "libero", expect=1)["wrong"] == 1  # which has no guards


def test_a_continued_chunk_repeats_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = make_policy("libero_delta", rtc=RtcConfig(execution_horizon=20))
    with Recorder(tmp_path, describe_policy(policy, random_weights=SEED)) as recorder:
        recorded = RecordingPolicy(policy, recorder, seed=0)
        first = recorded.infer(observation(0))["actions"]
        noise = np.zeros((50, 32), np.float32)
        leftover = Leftover(first[8:], 4)
        second = recorded.infer(observation(2), noise=noise, leftover=leftover)
    assert second["rtc"]["used"]
    alone = policy.infer(observation(2), noise=noise)["actions"]
    assert np.abs(second["actions"] - alone).max() > 1e-3  # the leftover counts
    assert replay(capsys, tmp_path)["max_rel_l2"] == 0
    metadata = json.loads((tmp_path / "recording.json").read_text())
    (tmp_path / "recording.json").write_text(json.dumps({**metadata, "rtc": {"execution_horizon": 5}}))
    assert [row["rel_l2"] > 0 for row in replay(capsys, tmp_path, expect=1)["rows"]] == [False, True]


# --- another policy ------------------------------------------------------------------------------------------------


def test_other_weights_are_detected(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = replay(capsys, recording, "--random-weights", "5", expect=1)
    assert not result["passed"] and result["wrong"] == 4 and result["max_rel_l2"] > 0.1
    assert main(["replay", str(recording), "--random-weights", "5"]) == 1
    text = capsys.readouterr().out
    assert "4 compared, 4 beyond the tolerance" in text and text.rstrip().endswith("FAILED")
    assert "segment-000001/000003" in text and "max rel_l2" in text


def test_a_robot_that_does_not_fit_is_an_error_of_each_record(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = replay(capsys, recording, "--robot", "droid", expect=1)
    assert result["wrong"] == 4 and result["max_rel_l2"] is None
    assert all("robot 'droid'" in row["error"] for row in result["rows"])


def test_another_number_of_actions_is_an_error_of_the_record(
    policy: Pi0Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder(tmp_path, describe_policy(policy, random_weights=SEED)) as recorder:
        recorder.write(Record(observation(0), {"actions": np.zeros((49, 7), np.float32)}, seed=0))
        recorder.write(Record(observation(0), {"actions": np.full((50, 7), np.nan, np.float32)}, seed=0))
    assert main(["replay", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "actions [50, 7], recorded were [49, 7]" in text and "the recorded actions are not finite" in text


def test_the_tolerance_is_reasoned() -> None:
    here = {"device": "cpu", "dtype": "float32", "machine": {"device": "A"}}
    there = {**here, "machine": {"device": "B"}}
    rounded = {**here, "dtype": "bfloat16"}
    assert default_tolerance(here, here)[0] == default_tolerance(rounded, rounded)[0] == 1e-6
    assert default_tolerance(here, there)[0] == 2e-5
    assert default_tolerance(rounded, {**there, "dtype": "bfloat16"})[0] == default_tolerance(rounded, here)[0] == 0.02


def test_what_decides_rounding_is_described(policy: Pi0Policy) -> None:
    described = policy.engine.describe()
    assert (described["device"], described["dtype"], described["backend"]) == ("cpu", "float32", "auto")
    assert (described["attention"], described["launch_configs"], described["solver"]) == ("auto", None, "euler")
    assert set(described["machine"]) == {"device", "threads", "torch"}


# --- what is left out ----------------------------------------------------------------------------------------------


def test_a_table_for_people_and_a_limit(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(recording), "--limit", "2"]) == 0
    text = capsys.readouterr().out
    assert "segment-000001/000002  0.000e+00  0.000e+00         12.0" in text and "000003" not in text
    assert "2 compared, 0 beyond" in text and "same machine and dtype" in text and text.rstrip().endswith("PASSED")
    assert main(["replay", str(recording), "--limit", "0"]) == 2


def test_errors_and_torn_records_are_told(
    policy: Pi0Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder(tmp_path, describe_policy(policy, random_weights=SEED)) as recorder:
        recorder.write(Record(observation(0), policy.infer(observation(0), seed=0), seed=0))
        recorder.write(Record(observation(1), {"error": {"code": "guard_violation", "message": "m"}}, seed=0))
        recorder.write(Record(observation(2), policy.infer(observation(2), seed=0), seed=0))
    lines = tmp_path / "segment-000001" / "records.jsonl"
    lines.write_bytes(lines.read_bytes()[:-10])
    assert main(["replay", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "1 compared, 0 beyond the tolerance, 1 recorded without actions" in captured.out
    assert "skipped segment-000001: a line is cut off" in captured.err
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[1:]))
    assert main(["replay", str(tmp_path)]) == 2
    assert "no record with actions to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "the recording does not say its checkpoint: give --checkpoint or --random-weights"),
        ({"sources": None}, "sources is None, expected a map"),
        ({"sources": {"checkpoint": ["x"]}}, "checkpoint is ['x'], expected str"),
        ({"sources": {"random_weights": "0"}}, "random_weights is '0', expected int"),
        ({"engine": []}, "engine is [], expected a map"),
        ({"engine": {"dtype": "int4"}}, "dtype is 'int4'"),
        ({"engine": {"attention": "all you need"}}, "attention is 'all you need'"),
        ({"model": {"model_type": "pi9"}}, "'pi9'"),
        ({"robot": {"name": 1}}, "cameras is missing"),
        ({"robot": None}, "the file is None, expected keys with values"),
        ({"rtc": {"mode": "magic"}}, "rtc mode is 'magic'"),
        ({"rtc": {"depth": 1}}, "unknown keys ['depth']"),
    ],
)
def test_a_changed_description_is_one_line(
    changes: dict[str, Any], message: str, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = json.loads((recording / "recording.json").read_text())
    (tmp_path / "recording.json").write_text(json.dumps({**metadata, **changes}))
    assert main(["replay", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and "Traceback" not in captured.err


def test_a_folder_that_is_no_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "is not a recording" in capsys.readouterr().err


# --- rerun ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("rerun") is None, reason="rerun-sdk is not installed (extra rerun)")
def test_a_rerun_file_has_cameras_and_actions(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "view.rrd"
    assert replay(capsys, recording, "--rerun", str(file))["passed"]
    data = file.read_bytes()
    assert data[:3] == b"RRF" and len(data) > 4 * 2 * 48 * 64 * 3  # four inferences, two cameras
    # Its own tool reads it back: every entity that was logged is there.
    shown = subprocess.run(
        [sys.executable, "-m", "rerun_cli", "rrd", "print", "-v", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    for entity in ("camera/base_0_rgb", "camera/left_wrist_0_rgb", "actions/chunk", "replayed/first", "instruction"):
        assert entity in shown.stdout
    assert main(["replay", str(recording), "--rerun", str(tmp_path / "absent" / "view.rrd")]) == 2


def test_without_rerun_the_error_names_the_extra(
    recording: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)  # importing it fails
    assert main(["replay", str(recording), "--rerun", "view.rrd"]) == 2
    assert "pip install 'pi0-engine[rerun]'" in capsys.readouterr().err

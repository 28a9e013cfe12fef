"""The benchmark of a whole inference on a small model on the CPU: what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_policy
import tables
from bench_policy import PolicyBench, parse
from tests.support.models import small_config


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread: several wait seconds for each other where others use the machine. And no ceilings of this CPU."""
    monkeypatch.setattr(bench_policy, "measure_ceilings", lambda *_: {"flops_per_s": 1e11, "bytes_per_s": 1e10})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a second; results go to ``tmp_path``/out."""
    (tmp_path / "small.json").write_text(json.dumps(small_config("pi0").to_dict()))
    config, output = str(tmp_path / "small.json"), str(tmp_path / "out")
    sizes = ["--views", "1", "2", "--prompt-tokens", "5", "--replays", "3", "--baseline-runs", "2"]
    return ["--config", config, "--output", output, "--device", "cpu", "--dtype", "float32", *sizes]


def written(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "out").glob("*_pi0_float32.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_parts_end_up_in_one_file(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PolicyBench(parse([*words, "--parts", "engine", "eager"])).run() == 0
    first = written(tmp_path)
    assert PolicyBench(parse([*words, "--parts", "compiled", "--compiler", "eager"])).run() == 0
    report = written(tmp_path)
    assert report["environment"] == first["environment"]
    assert report["workload"]["full_size"] is False
    assert {"commit", "date", "triton", "torch", "device"} <= set(report["environment"])
    for views in ("1", "2"):
        row = report["views"][views]
        assert row["verified"] and row["rel_l2"] < 1e-5
        assert row["wall"]["runs"] == 3
        assert row["floor"]["total"]["floor_ms"] > 0
        assert row["eager"]["prefix_tokens"] == 3 * 4 + 12
        assert row["compiled"]["verified"] and row["compiled"]["graph_breaks"] == 0
        assert row["compiled"]["over_engine_wall"] == row["compiled"]["p50_ms"] / row["wall"]["p50_ms"]
    assert "errors" not in report
    assert tables.policy_table(report) in capsys.readouterr().out
    assert "no graph was captured" in tables.graph_table(report)


def test_a_wrong_engine_is_not_timed(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_policy, "AGREEMENT", {torch.float32: 0.0, torch.bfloat16: 0.0})
    assert PolicyBench(parse([*words, "--parts", "engine"])).run() == 1
    report = written(tmp_path)
    assert "wall" not in report["views"]["1"]
    assert "relative L2" in report["errors"][0]


def test_a_wrong_engine_is_timed_when_asked_for_but_marked(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_policy, "AGREEMENT", {torch.float32: 0.0, torch.bfloat16: 0.0})
    assert PolicyBench(parse([*words, "--parts", "engine", "eager", "--even-if-wrong"])).run() == 1
    row = written(tmp_path)["views"]["1"]
    assert row["verified"] is False and "wall" in row
    assert "over_engine_wall" not in row["eager"]
    assert "1 (not verified)" in tables.policy_table(written(tmp_path))


def test_parts_of_different_runs_are_not_mixed(words: list[str], tmp_path: Path) -> None:
    PolicyBench(parse([*words, "--parts", "engine"])).run()
    with pytest.raises(ValueError, match="is of another run"):
        PolicyBench(parse([*words, "--parts", "eager", "--num-steps", "2"]))

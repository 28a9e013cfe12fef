"""The README's table and the plot come from the files of results, and from nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
import plot_results
from tables import results
from tests.support.paths import ROOT


def row(replay: float, **more: Any) -> dict[str, Any]:
    return {
        "verified": True,
        "replay": {"p50_ms": replay, "p99_ms": replay + 0.5},
        "wall": {"p50_ms": replay + 1},
        "floor": {"total": {"floor_ms": replay / 2}},
        "percent_of_floor": 50.0,
        "eager": {"p50_ms": 99.0, "verified": True},
        **more,
    }


#: Made up, to see how such a file is rendered.
REPORT: dict[str, Any] = {
    "kind": "policy",
    "environment": {"device": "Some GPU", "torch": "9.9", "triton": "8.8", "driver": "777.7"},
    "workload": {"model": "pi0", "full_size": True, "prompt_tokens": 20, "horizon": 50, "num_steps": 10},
    "dtype": "bfloat16",
    "views": {"1": row(4.0), "2": row(6.0, compiled={"p50_ms": 30.0, "over_engine_replay": 5.0, "verified": True})},
}


def test_the_readme_says_what_the_results_say() -> None:
    """After a change of results: python benchmarks/plot_results.py"""
    readme = (ROOT / "README.md").read_text()
    assert readme == plot_results.insert(readme, plot_results.readme_section(results(harness.RESULTS)))


def test_gpu_results_are_rendered() -> None:
    section = plot_results.readme_section({Path("some_pi0_bfloat16.json"): REPORT})
    assert "on Some GPU" in section
    assert "| 1 | 4.00 | 4.50 | 5.00 | 2.00 | 50 % | 99.0 | - | - |" in section
    assert "| 2 | 6.00 | 6.50 | 7.00 | 3.00 | 50 % | 99.0 | 30.0 | 5.0 |" in section
    assert "pending" not in section


def test_what_was_not_verified_is_not_published() -> None:
    report = copy.deepcopy(REPORT)
    report["views"]["2"]["verified"] = False
    assert plot_results.readme_section({Path("x.json"): report}) == plot_results.readme_section({})
    report = copy.deepcopy(REPORT)
    report["views"]["2"]["compiled"]["verified"] = False
    assert "30.0" not in plot_results.readme_section({Path("x.json"): report})
    small = {**REPORT, "workload": {**REPORT["workload"], "full_size": False}}
    assert "pending" in plot_results.readme_section({Path("x.json"): small})


def test_without_results_nothing_is_claimed() -> None:
    assert "pending" in plot_results.readme_section({})


def test_markers_are_needed() -> None:
    inserted = plot_results.insert(f"a\n{plot_results.BEGIN}\nold\n{plot_results.END}\nb\n", "new")
    assert inserted == f"a\n{plot_results.BEGIN}\nnew\n{plot_results.END}\nb\n"
    with pytest.raises(ValueError, match="README needs"):
        plot_results.insert("no markers", "new")


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_results.draw(tmp_path / "plot.png", REPORT)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H200", "h200_pi0_bfloat16.json"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090_pi0_bfloat16.json"),
        ("Orin", "orin_pi0_bfloat16.json"),
    ],
)
def test_names_of_files(device: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.benchmark, "describe_machine", lambda _: {"device": device})
    assert harness.result_path(None, torch.device("cpu"), "pi0", torch.bfloat16) == harness.RESULTS / expected
    assert harness.result_path(Path("a/b.json"), torch.device("cpu"), "pi0", torch.bfloat16) == Path("a/b.json")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    harness.write_json(tmp_path / "new" / "x.json", {"π": 0})
    harness.write_json(tmp_path / "new" / "x.json", {"π": 5})
    assert results(tmp_path / "new") == {tmp_path / "new" / "x.json": {"π": 5}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]


def test_drawn_weights_are_the_random_checkpoint() -> None:
    from pi0_engine.checkpoints.random_weights import RandomCheckpoint
    from tests.support.models import small_config

    config = small_config("pi0")
    drawn, checkpoint = harness.DrawnWeights(config, 3, torch.bfloat16), RandomCheckpoint(config, 3, torch.bfloat16)
    assert all(torch.equal(drawn.tensor(name), checkpoint.tensor(name)) for name in checkpoint.shapes)


def test_a_machine_without_nvidia_smi_has_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert harness.clocks() == {}
    monkeypatch.setenv("PI0_ENGINE_COMMIT", "given")
    assert harness.commit() == "given"  # there is no git either

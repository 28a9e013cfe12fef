"""The benchmark of single ops, as far as a CPU runs it: which problems, their data, what verification catches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_kernels
import tables
from contenders import contenders
from floors import stage_floors
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.trace import count_work
from tests.support.models import MODEL_TYPES, small_config
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def small_bench(model_type: ModelType = "pi0", views: tuple[int, ...] = (2,)) -> bench_kernels.Bench:
    return bench_kernels.Bench(small_config(model_type), torch.float32, CPU, views, 5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_problems_are_the_calls_of_an_inference(model_type: ModelType) -> None:
    config = Pi0Config(model_type)
    bench = bench_kernels.Bench(config, torch.bfloat16, CPU, (2,), 20)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[20])
    labels = {call.label for call, _ in bench.problems().values()}
    assert labels == set(bench.problems())
    calls = count_work(config, plan, torch.bfloat16)
    assert {call.op for call, _ in bench.problems().values()} == {call.op for call in calls}


def test_floors_of_full_size_pi0() -> None:
    """By hand for an H200 (790 TFLOP/s, 4.3 TB/s): vision 0.84, prefix 3.85, flow 6.27 GB / 4.3 TB/s = 1.46 ms."""
    config, ceilings = Pi0Config("pi0"), {"flops_per_s": 790e12, "bytes_per_s": 4.3e12}
    plan = ShapePlan.of(config, views=[3], prompt_lengths=[20])
    floors = stage_floors(config, plan, torch.bfloat16, ceilings)
    expected = {"vision": 0.84, "prefix": 3.85, "flow": 1.46, "total": 6.14}
    assert {name: row["floor_ms"] for name, row in floors.items()} == pytest.approx(expected, abs=0.01)


LABELS = ["linear_residual 8x36x36", "vision_attention 2x4 q, 4 k", "prefix_attention 1x13 q, 13 k"]


@pytest.mark.parametrize("label", LABELS)
def test_the_bare_library_call_runs(label: str) -> None:
    bench = small_bench()
    call, _ = bench.problems()[label]
    library = next(c for c in contenders(call, CPU, None) if c.name == "library")
    with torch.inference_mode():
        result = library.function(**bench.fill(call))
    assert isinstance(result, torch.Tensor) and bool(torch.isfinite(result).all())


def test_an_op_is_verified_and_timed() -> None:
    bench = small_bench()
    bench.ceilings = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    row = bench.measure(*bench.problems()["linear_residual 8x36x36"])
    assert row["implementations"]["torch"]["rel_l2"] < 1e-5 and row["implementations"]["torch"]["us"] > 0
    assert list(row["implementations"]["library"]) == ["us"]
    assert row["calls"] > 1 and row["floor_us"] > 0


def test_a_table_of_kernels() -> None:
    ours, torchs = {"us": 5.0, "rel_l2": 1e-3}, {"us": 10.0, "rel_l2": 1e-3}
    rows = [
        {"op": "linear 1x2x3", "calls": 7, "floor_us": 2.5, "implementations": {"triton": ours, "torch": torchs}},
        {"op": "linear 4x5x6", "calls": 1, "floor_us": 1.0, "implementations": {"triton": {"error": "no"}}},
    ]
    header, first, second = tables.kernels_table({"ops": rows}).splitlines()
    assert header.split()[0] == "op"
    assert first.split() == ["linear", "1x2x3", "7", "2.50", "5.00", "50", "%", "10.00", "-", "-"]
    assert "error" in second


def test_ops_are_checked_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    bench = small_bench(views=(1, 2))
    chosen = [call for call, _ in bench.problems().values()]
    assert chosen[-1].op == "rmsnorm_mlp_residual"
    wrong: dict[str, Any] = {**chosen[0].arguments, "weight": torch.empty(1, 1, device="meta")}
    broken = dataclasses.replace(chosen[0], arguments=wrong)
    assert bench_kernels._check(bench, [broken, *chosen]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert f"{len(chosen)} of {len(chosen) + 1} ops right" in out


def test_the_pytest_benchmark_runs_on_a_small_model(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "small.json").write_text(json.dumps(small_config("pi05").to_dict()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads wait for each other where others use the machine
    options = [
        "--kernels-views",
        "1",
        "--kernels-config",
        str(tmp_path / "small.json"),
        "--kernels-device",
        "cpu",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_kernels.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout

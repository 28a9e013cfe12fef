"""The benchmark of single ops, as far as a CPU runs it: which problems, their data, what verification catches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_kernels
import op_timing
import tables
from models import MODEL_TYPES, small_config
from op_problems import Problem, problems, stage_floors
from op_timing import Contender, cold_calls, verify
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.trace import count_work
from pi0_engine.kernels.stream import Scratch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def small_problems(model_type: ModelType = "pi0", dtype: torch.dtype = torch.float32) -> dict[str, Problem]:
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[5])
    return {problem.name: problem for problem in problems(config, plan, dtype, prompt=5)}


def arguments_of(problem: Problem) -> dict[str, Any]:
    return problem.materialize(CPU, Scratch.allocate(CPU, needed=False))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_problems_are_the_calls_of_an_inference(model_type: ModelType) -> None:
    config = Pi0Config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[20])
    found, calls = problems(config, plan, torch.bfloat16, prompt=20), count_work(config, plan, torch.bfloat16)
    assert sum(problem.calls for problem in found) == len(calls)
    assert sum(p.calls * p.cost.flops for p in found) == sum(call.cost.flops for call in calls)


def test_floors_of_full_size_pi0() -> None:
    """By hand for an H200 (790 TFLOP/s, 4.3 TB/s): vision 0.84, prefix 3.85, flow 6.27 GB / 4.3 TB/s = 1.46 ms."""
    config, ceilings = Pi0Config("pi0"), {"flops_per_s": 790e12, "bytes_per_s": 4.3e12}
    plan = ShapePlan.of(config, views=[3], prompt_lengths=[20])
    floors = stage_floors(config, plan, torch.bfloat16, ceilings)
    expected = {"vision": 0.84, "prefix": 3.85, "flow": 1.46, "total": 6.14}
    assert {name: row["floor_ms"] for name, row in floors.items()} == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_meaning_passes_its_verification(model_type: ModelType, dtype: torch.dtype) -> None:
    for name, problem in small_problems(model_type, dtype).items():
        error = verify(problem, problem.op.meaning, arguments_of(problem))
        assert error < op_timing.AGREEMENT[dtype], name


@pytest.mark.parametrize("name", ["linear_residual 8x36x36", "vision_attention 2x4x36", "rmsnorm_qkv_rope 13x40x96"])
def test_verification_catches_what_is_wrong(name: str) -> None:
    problem = small_problems()[name]
    with pytest.raises(ValueError, match="off by"):
        verify(problem, lambda **arguments: None, arguments_of(problem))

    def slightly_off(**arguments: Any) -> None:
        problem.op.meaning(**arguments)
        target = arguments[problem.outputs[0]]
        (target.x if hasattr(target, "x") else target).mul_(1.01)

    with pytest.raises(ValueError, match="off by"):
        verify(problem, slightly_off, arguments_of(problem))


def test_cold_calls_take_other_weights_each_time() -> None:
    problem = small_problems()["linear_residual 8x36x36"]
    arguments = arguments_of(problem)
    weight_bytes = arguments["weight"].numel() * 4
    calls = cold_calls(Contender("torch", problem.op.meaning), arguments, cache_bytes=20 * weight_bytes)
    used = [call.keywords["weight"].data_ptr() for call in calls]
    assert len(calls) == len(set(used)) == 40
    assert len({call.keywords["x"].data_ptr() for call in calls}) == 1


def test_cold_calls_of_an_op_without_weights() -> None:
    problem = small_problems()["vision_attention 2x4x36"]
    assert len(cold_calls(Contender("torch", problem.op.meaning), arguments_of(problem), 1 << 20)) == 16


@pytest.mark.parametrize("name", ["linear_residual 8x36x36", "vision_attention 2x4x36", "prefix_attention 1x13x64"])
def test_the_bare_library_call_runs(name: str) -> None:
    problem = small_problems()[name]
    library = next(c for c in op_timing.contenders(problem, CPU, None) if c.name == "library")
    with torch.inference_mode():
        result = library.function(**arguments_of(problem))
    assert isinstance(result, torch.Tensor) and bool(torch.isfinite(result).all())


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


def test_ops_are_checked_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config("pi0")
    bench = bench_kernels.Bench(config, torch.float32, CPU, (1, 2), 5)
    chosen = bench.problems()
    assert chosen[-1].op.name == "rmsnorm_mlp_residual"
    broken = Problem("flow", chosen[0].op, {}, 1, 5)
    object.__setattr__(broken, "arguments", {**chosen[0].arguments, "weight": torch.empty(1, 1, device="meta")})
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

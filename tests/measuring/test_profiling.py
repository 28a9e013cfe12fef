"""pi0-engine profile: every call is counted and timed once, and the engine is left as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pi0_engine.cli import main
from pi0_engine.config import ModelType
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.trace import count_work, work_per_stage
from pi0_engine.kernels.ranges import RangedOps
from pi0_engine.kernels.registry import all_ops
from pi0_engine.kernels.stream import Scratch
from pi0_engine.measuring.benchmark import Workload, measure_ceilings
from pi0_engine.measuring.op_calls import (
    AGREEMENT,
    OpCall,
    distinct,
    expected_outputs,
    fill,
    output_names,
    record_op_calls,
    repeated,
    verify,
)
from pi0_engine.measuring.profiling import plan_of, profile, write_trace
from pi0_engine.measuring.timing import ClockedOps, call_seconds, run_seconds
from tests.support.golden import GOLDEN
from tests.support.models import MODEL_TYPES, engine, fresh_engine, random_noise, small_config
from tests.support.paths import ROOT

CPU = torch.device("cpu")
TINY = str(GOLDEN / "pi0_tiny.json")


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds where the machine is busy."""
    ceilings = {"flops_per_s": 2e11, "bytes_per_s": 2e10}
    monkeypatch.setattr("pi0_engine.measuring.profiling.measure_ceilings", lambda dtype, device: ceilings)


def workload(model_type: ModelType, **changes: Any) -> Workload:
    config = small_config(model_type)
    return dataclasses.replace(Workload(config, 2, 5, config.action_horizon, config.num_steps, seed=0), **changes)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recorded_calls_are_those_of_an_inference(model_type: ModelType) -> None:
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[5], prompt_bucket=4)
    calls = record_op_calls(config, plan, torch.bfloat16)
    assert [call.call for call in calls] == count_work(config, plan, torch.bfloat16)
    assert all(call.shape for call in calls)
    assert {call.valid_rows for call in calls} == {plan.prefix}
    kinds = distinct(calls)
    assert sum(count for _, count in kinds) == len(calls) > len(kinds) == len({call.key for call in calls})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "per_token_time"), [("pi0", False), ("pi05", False), ("pi05", True)])
def test_every_op_runs_on_random_arguments_of_its_call(
    model_type: ModelType, per_token_time: bool, dtype: torch.dtype
) -> None:
    config = small_config(model_type)
    lengths: dict[str, Any] = {"views": [2], "prompt_lengths": [5], "samples": 2, "prompt_bucket": 4}
    plan = ShapePlan.of(config, **lengths, per_token_time=per_token_time)
    scratch = Scratch.allocate(CPU, needed=False)
    seen = set()
    for call in record_op_calls(config, plan, dtype, prompt_tokens=5):
        assert call.valid_rows == plan.prefix - 3
        filled, meaning = fill(call, CPU, scratch), all_ops()[call.op].meaning
        for name, value in filled.items():
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.dtype) == (call.arguments[name].shape, call.arguments[name].dtype)
                if value.is_floating_point() and name not in output_names(call.op) and name != "hidden":
                    assert value.numel() < 3 or value.float().std() > 0.01
        assert verify(call, meaning, filled) < AGREEMENT[dtype]
        meaning(**filled)
        assert verify(call, meaning, filled) < AGREEMENT[dtype]  # again on the same memory, as it is timed
        seen.add(call.op)
    assert seen >= {"suffix_attention", "rmsnorm_mlp_residual", "embed_prompt", "rmsnorm_linear_euler"}


def small_call(op: str) -> OpCall:
    config = small_config("pi0")
    calls = record_op_calls(config, ShapePlan.of(config, views=[1], prompt_lengths=[3]), torch.float32)
    return next(call for call in calls if call.op == op)


@pytest.mark.parametrize("op", ["rmsnorm_qkv_rope", "linear_residual", "vision_attention", "rmsnorm_mlp_residual"])
def test_a_wrong_output_is_found(op: str) -> None:
    call, meaning = small_call(op), all_ops()[op].meaning
    filled = fill(call, CPU, Scratch.allocate(CPU, needed=False))
    name = output_names(op)[-1]

    def off_by_a_little(**arguments: Any) -> None:
        meaning(**arguments)
        part = getattr(arguments[name], "x", arguments[name])
        part[0, 0] += 1e-3 * part.norm()

    before = {name: getattr(value, "x", value) for name, value in filled.items()}
    before = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    before.pop("hidden", None)
    with pytest.raises(ValueError, match=f"wrong: {name} is off by"):
        verify(call, off_by_a_little, filled)
    with pytest.raises(ValueError, match="is off by"):
        verify(call, lambda **_: None, filled)
    expected = expected_outputs(op, filled)
    assert verify(call, meaning, filled, expected) == verify(call, meaning, filled) < 1e-5
    for name, value in before.items():
        torch.testing.assert_close(getattr(filled[name], "x", filled[name]), value, rtol=0, atol=0, equal_nan=True)


def test_working_memory_is_no_output() -> None:
    assert output_names("rmsnorm_qkv_rope") == ["q", "k", "v"]
    assert output_names("rmsnorm_mlp_residual") == ["residual"]


def test_repeated_calls_are_at_least_as_many_as_asked_for() -> None:
    call = small_call("linear_residual")
    counted: list[int] = []
    calls = repeated(lambda **_: counted.append(1), call.arguments, 7, cache_bytes=0)
    assert len(call_seconds(calls, CPU, repeats=3)) == 3
    assert len(counted) == 7 * 4  # one to warm up
    assert all(seconds > 0 for seconds in call_seconds(calls, CPU))


def test_repeated_calls_read_other_weights_each_time() -> None:
    call = small_call("linear_residual")
    arguments = fill(call, CPU, Scratch.allocate(CPU, needed=False))
    calls: Any = repeated(lambda **_: None, arguments, 16, cache_bytes=20 * call.weight_bytes)
    used = [each.keywords["weight"].data_ptr() for each in calls]
    assert len(calls) == len(set(used)) == 40
    assert all(torch.equal(each.keywords["weight"], arguments["weight"]) for each in calls)
    assert len({each.keywords["x"].data_ptr() for each in calls}) == 1
    assert len(repeated(lambda **_: None, arguments, 16, cache_bytes=1 << 40)) == 512
    # One that is larger than the cache is still not read twice in a row.
    assert len(repeated(lambda **_: None, arguments, 1, cache_bytes=1)) == 2


def test_keys_of_the_prefix_are_cold_but_no_weights() -> None:
    call = small_call("suffix_attention")
    arguments = fill(call, CPU, Scratch.allocate(CPU, needed=False))
    calls: Any = repeated(lambda **_: None, arguments, 1, cache_bytes=4 * arguments["prefix_k"].numel() * 4)
    assert len({each.keywords["prefix_k"].data_ptr() for each in calls}) == 8 and call.weight_bytes == 0


def test_what_comes_before_a_run_is_not_timed() -> None:
    log: list[str] = []
    seconds = run_seconds(lambda: log.append("run"), CPU, 3, before=lambda: log.append("before"), warmup=2)
    assert log == ["before", "run"] * 5 and len(seconds) == 3


@pytest.mark.usefixtures("known_ceilings")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_profile_counts_everything_once(model_type: ModelType) -> None:
    work, running = workload(model_type, samples=2), fresh_engine(small_config(model_type))
    ops, plan = running.ops, plan_of(running, work)
    noise = random_noise(work.config, samples=2)
    expected = running.infer(work.inputs()[0], noise).actions
    report = profile(running, work, runs=2)
    calls = count_work(work.config, plan, torch.float32)
    assert sum(row["calls"] for row in report["ops"]) == sum(row["launches"] for row in report["ops"]) == len(calls)
    for stage, cost in work_per_stage(calls).items():
        rows = [row for row in report["ops"] if row["stage"] == stage]
        assert sum(row["flops"] for row in rows) == pytest.approx(cost.flops)
        assert sum(row["bytes"] for row in rows) == pytest.approx(cost.bytes)
    for row in report["ops"]:
        floor = max(row["flops"] / report["ceilings"]["flops_per_s"], row["bytes"] / report["ceilings"]["bytes_per_s"])
        assert row["floor_ms"] == pytest.approx(1e3 * floor) and row["ms"] == row["running_ms"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
        assert row["implementation"] == "torch" and row["kernels"] == []
    assert sum(row["share"] for row in report["ops"]) == pytest.approx(1)
    assert report["ops_ms"] == pytest.approx(sum(row["ms"] for row in report["ops"]))
    assert "replay_ms" not in report and json.dumps(report)
    assert running.ops is ops
    assert torch.equal(running.infer(work.inputs()[0], noise).actions, expected)


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs is 0"):
        profile(engine(small_config("pi0")), workload("pi0"), runs=0)


def test_ceilings_are_not_measured_on_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ones", "zeros", "full"):
        monkeypatch.setattr(torch, name, None)
    ceilings = measure_ceilings(torch.float32, CPU)
    assert ceilings["flops_per_s"] > 1e8 and ceilings["bytes_per_s"] > 1e8


def test_a_trace_names_stages_layers_and_ops(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    write_trace(engine(small_config("pi0")), workload("pi0"), str(file))
    events = json.loads(file.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {"vision", "vision layer 0", "prefix", "flow step 2", "expert layer 1", "suffix_attention"} <= set(names)
    assert names.count("rmsnorm_linear_euler") == 3


def test_nvtx_ranges_nest_from_stage_to_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for nvtx: what a profiler would see, in the domain that docs/profiling.md filters by."""
    stack: list[str] = []
    paths: list[str] = []

    @contextmanager
    def annotate(name: str, domain: str) -> Iterator[None]:
        assert domain == "pi0_engine"
        stack.append(name)
        paths.append("/".join(stack))
        yield
        stack.pop()

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    running, work = fresh_engine(small_config("pi0")), workload("pi0")
    running.ops = ClockedOps(RangedOps(running.ops), CPU)  # a clock lets ranges through
    running.infer(*work.inputs())
    assert {"vision/patch_embed", "prefix/prefix layer 2/rmsnorm_qkv_rope"} <= set(paths)
    assert "flow/flow step 1/expert layer 0/linear_residual" in paths
    assert len(running.ops.take_seconds()) == len(count_work(work.config, plan_of(running, work), torch.float32))


@pytest.mark.usefixtures("known_ceilings")
def test_profile_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, trace = tmp_path / "roofline.png", tmp_path / "trace.json"
    arguments = ["profile", "--config", TINY, "--random-weights", "0", "--dtype", "float32", "--runs", "1"]
    assert main([*arguments, "--plot", str(plot), "--trace", str(trace), "--views", "1", "--num-steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "pi0, float32, 1 views, prompt 20, chunk 50, 1 samples, 2 steps (euler), 1 runs" in text
    assert "rmsnorm_mlp_residual" in text and "an inference without a graph" in text
    with Image.open(plot) as picture:
        assert picture.size[0] > 800
    assert trace.stat().st_size > 1000
    assert main([*arguments, "--json", "--num-steps", "1", "--samples", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["samples"] == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--random-weights", "0", "--graph-dot", "x.dot"], "--graph-dot writes a CUDA graph"),
        (["--random-weights", "0", "--device", "cuda", "--graph-dot", "x.dot"], "sees no CUDA GPU"),
        (["--random-weights", "0", "--runs", "0"], "runs is 0"),
        (["--random-weights", "0", "--launch-configs", "absent.json"], "absent.json cannot be read"),
        ([], "exactly one of --checkpoint and --random-weights"),
    ],
)
def test_what_cannot_be_profiled_is_said(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", "--config", TINY, *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


INTERPRETED = """
import dataclasses, json
from tests.support.models import fresh_engine, small_config
from pi0_engine.measuring.benchmark import Workload
import pi0_engine.measuring.profiling
from pi0_engine.measuring.profiling import profile

pi0_engine.measuring.profiling.measure_ceilings = lambda dtype, device: {"flops_per_s": 2e11, "bytes_per_s": 2e10}
config = small_config("pi0")
config = dataclasses.replace(
    config, vision=dataclasses.replace(config.vision, depth=1), llm=dataclasses.replace(config.llm, depth=2),
    expert=dataclasses.replace(config.expert, depth=2))
report = profile(fresh_engine(config, backend="triton"), Workload(config, 1, 3, 5, 1, seed=0), runs=1)
print(json.dumps(report["ops"]))
"""


def test_launches_of_our_kernels_are_named() -> None:
    """In Triton's interpreter, which has to be chosen before Triton is imported: hence another process."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    rows = {row["op"]: row for row in json.loads(run.stdout)}
    assert rows["rmsnorm_qkv_rope"]["implementation"] == "triton"
    assert [kernel["kernel"] for kernel in rows["rmsnorm_qkv_rope"]["kernels"]] == ["paired_kernel"]
    # Without programs that run at the same time the fused MLP is two launches.
    assert [kernel["kernel"] for kernel in rows["rmsnorm_mlp_residual"]["kernels"]] == ["mlp_kernel"] * 2
    assert rows["rmsnorm_mlp_residual"]["launches"] == 2 * rows["rmsnorm_mlp_residual"]["calls"]

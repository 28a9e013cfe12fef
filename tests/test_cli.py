"""The command line: each subcommand run as a user runs it, on small models."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from pi0_engine.cli import main
from pi0_engine.commands.bench import Bench
from pi0_engine.commands.eval import Eval
from pi0_engine.demo.evaluate import Backend as EvalBackend
from pi0_engine.kernels import gemm
from pi0_engine.measuring import benchmark
from pi0_engine.measuring.benchmark import Baseline
from tests.support.checkpoints import tiny_config, write_openpi
from tests.support.golden import GOLDEN

CASE = GOLDEN / "pi0_tiny_c09_only_cam1_h10_s4.npz"
VERIFY = ["verify", "--random-weights", "0", "--config", str(GOLDEN / "pi0_tiny.json"), "--case", str(CASE)]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates are measured on little: at the size that counts they take over a second of every bench."""
    monkeypatch.setattr(benchmark, "_ceiling_sizes", lambda dtype, device: (64, 256, 1 << 18))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 0.01)])
def test_verify_passes(backend: str, dtype: str, bound: float, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, *VERIFY, "--backend", backend, "--dtype", dtype)
    assert result["passed"] and 0 < result["rel_l2"] <= bound
    assert result["cosine"] > 0.9999 and result["seconds"] > 0 and result["max_abs"] > 0


def test_verify_reads_a_checkpoint_file_with_the_sizes_from_the_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_openpi(tmp_path, tiny_config("pi0"))
    (directory / "config.json").unlink()
    for source in (directory, directory / "model.safetensors"):
        assert main(["verify", "--checkpoint", str(source), "--case", str(CASE)]) == 0
        assert re.search(r"rel_l2 +\d\.\d+e-07 .*PASSED", capsys.readouterr().out, re.DOTALL)


def test_verify_fails_beyond_the_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VERIFY, "--tolerance", "1e-9"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main([*VERIFY[:2], "1", *VERIFY[3:]]) == 1  # other weights


def test_a_backend_that_cannot_run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the tests of the kernels set it
    assert main([*VERIFY, "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run op" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--random-weights", "0", "--config", "pi0", "--case", "absent.npz"], "no case file absent.npz"),
        (["verify", "--case", str(CASE)], "exactly one of --checkpoint and --random-weights"),
        (["verify", "--checkpoint", "nowhere/at/all", "--case", str(CASE)], "nowhere/at/all"),
        ([*VERIFY, "--device", "cuda"], "sees no CUDA GPU"),
        ([*VERIFY, "--device", "toaster"], "'toaster'"),
        (["bench", "--config", "pi7"], "neither 'pi0', 'pi05' nor a file"),
        (["bench", "--config", str(GOLDEN / "pi0_tiny.json"), "--views", "5"], "views is 5"),
        (["bench", "--config", str(GOLDEN / "pi0_tiny.json"), "--prompt-tokens", "49"], "prompt tokens are 49"),
        (["bench", "--config", str(GOLDEN / "pi0_tiny.json"), "--runs", "0"], "runs is 0"),
        (["infer", "--robot", "libero", "--checkpoint", "x", "--image", "nonsense"], "KEY=FILE"),
        (["infer", "--robot", "libero", "--checkpoint", "x", "--image", "top=a.png"], "has cameras"),
        (["infer", "--robot", "libero", "--checkpoint", "x", "--state", "observation/state=1,two"], "'two'"),
        (["infer", "--robot", "toaster", "--checkpoint", "x"], "toaster"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and "Traceback" not in captured.err


def test_a_damaged_case_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(CASE.read_bytes()[:1000])
    assert main([*VERIFY[:-1], str(broken)]) == 2
    np.savez(tmp_path / "other.npz", in_noise=np.zeros(3))
    assert main([*VERIFY[:-1], str(tmp_path / "other.npz")]) == 2
    errors = capsys.readouterr().err
    assert "broken.npz is not an .npz file" in errors and "it has no in_tokens" in errors


def test_bench_in_float16_has_no_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--config", "pi0", "--dtype", "float16", "--baseline", "reference"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "the reference runs in float32 or bfloat16, not in float16" in captured.err


def test_bench_reports_stages_floor_baseline_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "bench.png"
    arguments = ["bench", "--config", str(GOLDEN / "pi0_tiny.json"), "--random-weights", "3", "--views", "2"]
    arguments += ["--prompt-tokens", "12", "--horizon", "10", "--num-steps", "2", "--dtype", "bfloat16"]
    report = run_json(capsys, *arguments, "--runs", "2", "--baseline", "reference", "--plot", str(plot))
    assert list(report["engine"]) == ["inputs", "vision", "prefix", "flow", "total"]
    for stage in ("vision", "prefix", "flow", "total"):
        row = report["engine"][stage]
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["floor_ms"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["p50_ms"])
    assert report["baseline"]["prefix_tokens"] == 816
    assert 0 < report["baseline"]["rel_l2"] < 0.03
    assert report["speedup"] == pytest.approx(report["baseline"]["p50_ms"] / report["engine"]["total"]["p50_ms"])
    assert report["workload"]["views"] == 2 and report["dtype"] == "bfloat16"
    assert report["peak_memory_bytes"] > report["packed_weight_bytes"] > 0
    with Image.open(plot) as picture:
        assert picture.size[0] > 500


def test_bench_compares_with_bfloat16_that_is_not_widened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor that is faster in float32, the two round differently."""
    monkeypatch.setattr(gemm, "cpu_products", lambda: gemm.CpuProducts(1e9, 2e9, 2e9))
    arguments = [
        "bench",
        "--config",
        str(GOLDEN / "pi0_tiny.json"),
        "--horizon",
        "10",
        "--num-steps",
        "2",
        "--runs",
        "1",
    ]
    arguments += ["--dtype", "bfloat16", "--baseline", "unwidened"]
    report = run_json(capsys, *arguments)
    assert report["baseline"]["name"] == "unwidened" and 1e-4 < report["baseline"]["rel_l2"] < 0.03
    assert report["speedup"] == pytest.approx(report["baseline"]["p50_ms"] / report["engine"]["total"]["p50_ms"])
    assert main(arguments) == 0
    assert "x bfloat16 multiplied as it is; actions agree to" in capsys.readouterr().out


def test_a_gpu_has_no_unwidened_baseline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "resolve_device", lambda name: torch.device("cuda"))
    assert main(["bench", "--config", str(GOLDEN / "pi0_tiny.json"), "--baseline", "unwidened"]) == 2
    assert "the baseline 'unwidened' is of a CPU" in capsys.readouterr().err


def test_bench_compares_with_the_reference_of_the_same_solver(capsys: pytest.CaptureFixture[str]) -> None:
    """float32 within 1e-4, or it would be an error; midpoint's flow is twice Euler's work."""
    arguments = [
        "bench",
        "--config",
        str(GOLDEN / "pi0_tiny.json"),
        "--horizon",
        "10",
        "--num-steps",
        "3",
        "--runs",
        "1",
    ]
    reports = {
        solver: run_json(capsys, *arguments, "--dtype", "float32", "--baseline", "reference", "--solver", solver)
        for solver in ("euler", "midpoint", "adams_bashforth")
    }
    assert {solver: report["workload"]["solver"] for solver, report in reports.items()} == {s: s for s in reports}
    work = {solver: report["engine"]["flow"]["flops"] for solver, report in reports.items()}
    assert work["adams_bashforth"] == work["euler"] and 1.8 < work["midpoint"] / work["euler"] < 2


def test_bench_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--config", str(GOLDEN / "pi05_tiny.json"), "--runs", "1", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "pi05, float32, 2 views, prompt 20, chunk 50, 10 steps" in text
    assert re.search(r"^total +[\d.]+ +[\d.]+ +[\d.]+ +\d+ %$", text, re.MULTILINE)
    assert "peak memory" in text and "reference" not in text


def test_infer_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("base", "wrist"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "state.npy", np.linspace(-1, 1, 8))
    arguments = ["infer", "--robot", "libero", "--random-weights", "0", "--config", str(GOLDEN / "pi0_tiny.json")]
    arguments += ["--image", f"observation/image={tmp_path}/base.png", f"observation/wrist_image={tmp_path}/wrist.png"]
    arguments += ["--state", f"observation/state={tmp_path}/state.npy", "--prompt", "lift the cup"]
    saved, plot = tmp_path / "actions.npy", tmp_path / "chunk.png"
    files = ["--output", str(saved), "--plot", str(plot)]
    assert main([*arguments, *files, "--num-samples", "2", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^step +a0 .*a6$", text, re.MULTILINE) and "the first of 2 candidate chunks" in text
    assert np.load(saved).shape == (2, 50, 7)
    with Image.open(plot) as picture:
        assert picture.size[0] > 500
    reply = run_json(capsys, *arguments, "--dtype", "float32")
    other = run_json(capsys, *arguments, "--dtype", "float32", "--solver", "midpoint")
    assert 0 < np.abs(np.subtract(other["actions"], reply["actions"])).max() < 1
    assert np.shape(reply["actions"]) == (50, 7) and reply["policy_timing"]["infer_ms"] > 0
    assert reply["state"][0] == -1.0


def test_infer_shows_chw_cameras_upright(tmp_path: Path) -> None:
    """ALOHA's frames are channel-first in the observation; the picture takes them all the same."""
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "frame.png")
    arguments = ["infer", "--robot", "aloha", "--random-weights", "0", "--config", str(GOLDEN / "pi0_tiny.json")]
    arguments += ["--image", f"images/cam_high={tmp_path}/frame.png", "--prompt", "wave", "--dtype", "float32"]
    arguments += ["--state", "state=" + ",".join(["0.1"] * 14), "--plot", str(tmp_path / "chunk.svg")]
    assert main(arguments) == 0
    assert (tmp_path / "chunk.svg").stat().st_size > 1000


def test_env_says_what_would_run_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "env")
    assert report["ops"]["prefix_attention"].startswith("torch: ")
    assert report["engine"]["dtype"].split(":")[0] in ("float32", "bfloat16")
    assert report["engine"]["frames"].split(":")[0] in ("cpp", "pillow")
    assert main(["env"]) == 0
    assert "optional packages" in capsys.readouterr().out


def test_the_installed_script_and_every_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    script = shutil.which("pi0-engine", path=str(Path(sys.executable).parent))
    assert script, "pi0-engine is not installed beside this Python"
    top = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    listed = re.search(r"\{([a-z,]+)\}", top)
    assert listed, top
    commands = listed[1].split(",")
    assert set(commands) >= {"demo", "eval", "infer", "serve", "simulate", "replay", "verify", "bench", "env"}
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and len(capsys.readouterr().out) > 400


def test_options_name_the_choices_that_there_are() -> None:
    """Their modules need torch, so that a command's help cannot ask them."""
    for command, option, choices in ((Bench, "baseline", get_args(Baseline)), (Eval, "backend", get_args(EvalBackend))):
        annotation = get_type_hints(command)[option]
        literals = [annotation] if get_origin(annotation) is Literal else get_args(annotation)
        assert tuple(name for literal in literals for name in get_args(literal)) == choices

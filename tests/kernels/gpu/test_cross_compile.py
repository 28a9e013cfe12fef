"""Compiling for absent GPUs, on toy kernels. In processes of their own: here Triton may be interpreting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pi0_engine.kernels.gpu.target import TARGETS
from tests.support.paths import ROOT

try:
    from pi0_engine.cli import main
except ImportError:
    main = None  # type: ignore[assignment]

pytest.importorskip("triton", reason="Triton is not installed")
needs_tyro = pytest.mark.skipif(main is None, reason="the command line needs tyro")

TOYS = ("gemm", "attention_256", "spilling", "overflowing", "tma_gemm", "dependent")

#: Compiles every toy for two targets, twice, and prints what was said of each.
COMPILE = """
import dataclasses, json, sys
from tests.support import toy_kernels
from pi0_engine.kernels.gpu.cross_compile import compile_all
from pi0_engine.kernels.gpu.target import TARGETS

names = sys.argv[1].split(",")
jobs = [(getattr(toy_kernels, name)(), TARGETS[arch]) for name in names for arch in (87, 90)]
for take in range(2):
    outcomes = dict(compile_all(jobs, processes=2))
said = {}
for number, (launch, target) in enumerate(jobs):
    compiled = outcomes[number].compiled
    entry = dataclasses.asdict(compiled) if compiled else {}
    said[f"{names[number // 2]} {target.arch}"] = entry | {"problem": outcomes[number].problem}
print(json.dumps(said))
"""

#: The command line, with toys in place of the models' kernels.
COMMAND = """
import sys
from tests.support import toy_kernels
from pi0_engine.cli import main
from pi0_engine.engine import trace

launches = [getattr(toy_kernels, name)() for name in sys.argv[1].split(",")]
trace.record_launches = lambda config, plan, dtype, target: launches
sys.exit(main(sys.argv[2:]))
"""


def python(script: str, *arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, dict[str, Any]]:
    done = python(COMPILE, ",".join(TOYS), cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ptx(cache: Path, kernel: str, target: str) -> str:
    """What the kernel was compiled to, from Triton's cache."""
    found = [text for path in cache.glob(f"*/{kernel}.ptx") if f".target {target}" in (text := path.read_text())]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("toy", ["gemm 87", "gemm 90", "attention_256 90", "tma_gemm 90", "dependent 90"])
def test_a_sound_kernel(toy: str, compiled: dict[str, dict[str, Any]]) -> None:
    said = compiled[toy]
    assert said["problem"] is None
    assert 0 < said["registers"] <= 255 and said["spill_bytes"] == 0
    assert 0 <= said["shared_bytes"] <= TARGETS[int(toy[-2:])].shared_bytes
    assert said["seconds"] is None, "Triton's cache has it the second time"


@pytest.mark.parametrize("arch", [87, 90])
def test_spills_are_seen(arch: int, compiled: dict[str, dict[str, Any]]) -> None:
    said = compiled[f"spilling {arch}"]
    assert said["stack_bytes"] > 0 and said["spill_bytes"] > said["stack_bytes"]
    assert said["problem"] == f"spills {said['spill_bytes']} bytes"


@pytest.mark.parametrize("arch", [87, 90])
def test_an_overflow_of_shared_memory_is_seen(arch: int, compiled: dict[str, dict[str, Any]]) -> None:
    said = compiled[f"overflowing {arch}"]
    limit = TARGETS[arch].shared_bytes
    assert said["shared_bytes"] > limit
    assert f"takes {said['shared_bytes'] / 1024:.1f} KiB of shared memory of {limit // 1024}" in said["problem"]


def test_what_a_gpu_cannot_do_does_not_compile(compiled: dict[str, dict[str, Any]]) -> None:
    problem = compiled["dependent 87"]["problem"]
    assert problem.startswith("does not compile: PTXASError") and "requires .target sm_90 or higher" in problem


def test_the_code_is_the_targets_own(compiled: dict[str, dict[str, Any]], cache: Path) -> None:
    assert "griddepcontrol.wait" in ptx(cache, "dependent_add", "sm_90a")
    assert "cp.async.bulk.tensor" in ptx(cache, "tiled_gemm", "sm_90a")
    assert "cp.async.bulk.tensor" not in ptx(cache, "tiled_gemm", "sm_87")


def test_instances_are_told_apart_as_triton_does(cache: Path) -> None:
    script = """
from tests.support.toy_kernels import dependent, gemm
from pi0_engine.kernels.gpu.cross_compile import instance_key
from pi0_engine.kernels.gpu.target import TARGETS

def same(one, two):
    return instance_key(one, TARGETS[90]) == instance_key(two, TARGETS[90])

assert same(gemm(276), gemm(300)), "both rows are no multiple of 16"
assert not same(gemm(276), gemm(288)) and not same(gemm(276), gemm(1))
for other in (gemm(warps=8), gemm(stages=2), gemm(block=(32, 64, 32))):
    assert not same(gemm(), other)
assert not same(dependent(pdl=True), dependent(pdl=False))
assert instance_key(gemm(), TARGETS[87]) == instance_key(gemm(), TARGETS[90])
"""
    done = python(script, cache=cache)
    assert done.returncode == 0, done.stderr


def test_compiling_leaves_no_driver_behind(cache: Path) -> None:
    script = """
from tests.support.toy_kernels import dependent
from triton.runtime.driver import driver
from pi0_engine.kernels.gpu.cross_compile import compile_launch
from pi0_engine.kernels.gpu.target import TARGETS

mine = object()
for before in (None, mine):
    driver.set_active(before)
    compile_launch(dependent(), TARGETS[90])
    assert driver._active is before
"""
    done = python(script, cache=cache)
    assert done.returncode == 0, done.stderr


@needs_tyro
def test_interpreted_kernels_are_refused(cache: Path) -> None:
    done = python(COMMAND, "gemm", "kernels", "--target", "sm_90", cache=cache, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "imported for Triton's interpreter" in done.stderr and "Traceback" not in done.stderr


@needs_tyro
def test_command_passes(cache: Path, compiled: dict[str, dict[str, Any]]) -> None:
    done = python(COMMAND, "gemm,tma_gemm", "kernels", "--target", "sm_87, sm_90", "--op", "linear", cache=cache)
    lines = done.stdout.splitlines()
    assert lines[0] == "sm_87 (Jetson AGX Orin): 163 KiB of shared memory per block"
    gemm_line = next(line for line in lines if "masked_gemm(rows=276, columns=1152, products=4304, BLOCK_M=64" in line)
    assert gemm_line.split()[:5] == ["linear", str(compiled["gemm 87"]["registers"]), "0", "16.0", "cached"]
    assert "5 x 18" in gemm_line and gemm_line.endswith("4 warps, 3 stages)")


@needs_tyro
def test_command_fails_and_names_op_shape_and_configuration(cache: Path, compiled: dict[str, dict[str, Any]]) -> None:
    toys = "gemm,spilling,overflowing,dependent"
    done = python(COMMAND, toys, "kernels", "--target", "sm_90", "--config", "pi0", cache=cache)
    assert done.returncode == 1
    spills = f"spills {compiled['spilling 90']['spill_bytes']} bytes"
    where = "in pi0 with 1 view"
    assert f"\nsm_90 norm: normalize(COUNT=16384; 1 warps, 1 stages) {where} {spills}\n" in done.stdout
    assert f"BLOCK_N=256, BLOCK_K=64; 8 warps, 6 stages) {where} takes 288.0 KiB of shared memory of 227" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAILED: 2 of 4 kernels for 1 targets, Triton ")


@needs_tyro
def test_command_prints_json(cache: Path, compiled: dict[str, dict[str, Any]]) -> None:
    done = python(COMMAND, "gemm,dependent", "kernels", "--target", "sm_90", "--op", "add", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (entry,) = report["targets"]["sm_90"]
    assert entry["instance"] == "dependent_add(count=1000, BLOCK=128; 4 warps, 1 stages, pdl)"
    inferences = {f"{m} with {v}": 1 for m in ("pi0", "pi05") for v in ("1 view", "2 views", "3 views")}
    of_second_order = {f"{m} with 1 view and a solver of second order": 1 for m in ("pi0", "pi05")}
    assert entry["launches"] == {**inferences, "pi05 with 1 view and a given prefix": 1, **of_second_order}
    assert entry["shared_bytes"] == 0 and entry["shared_limit_bytes"] == 227 * 1024 and report["problems"] == []


@needs_tyro
def test_bad_input_is_one_line_and_status_2(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["kernels", "--target", "sm_90,sm_91"]) == 2
    assert "target is 'sm_91', expected one of ['sm_80'" in capsys.readouterr().err
    done = python(COMMAND, "gemm", "kernels", "--target", "sm_90", "--op", "linaer", cache=cache)
    assert done.returncode == 2 and "op is 'linaer', expected one of [" in done.stderr
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["kernels"]) == 2
    assert "pip install 'pi0-engine[gpu]'" in capsys.readouterr().err

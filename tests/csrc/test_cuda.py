"""What can be known of the CUDA sources without a GPU.

They compile for every GPU that is supported, without spilling registers, and the kernel run by CPU threads is right.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.frames import needs_extension
from tests.support.nvcc import NVCC
from tests.support.paths import ROOT

CXX = (os.environ.get("CXX") or "g++").split()[0]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")


def constant(name: str) -> list[str]:
    """A constant of setup.py, which cannot be imported without installing something."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [str(value) for value in ast.literal_eval(node.value)]
    raise AssertionError(f"setup.py has no {name}")


def test_the_gpus_that_are_supported() -> None:
    assert constant("CUDA_ARCHITECTURES") == ["80", "86", "87", "89", "90", "100", "110", "120"]


@needs_nvcc
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_compiles_everywhere_without_spills(source: Path, tmp_path: Path) -> None:
    assert NVCC is not None
    known = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    targets = [number for number in constant("CUDA_ARCHITECTURES") if f"sm_{number}" in known]
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    command = [NVCC, *constant("NVCC_FLAGS"), *code, "-Werror=all-warnings", "-Xptxas=-v", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "compiled.o")], capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert set(re.findall(r"for 'sm_(\d+)'", report)) == set(targets)
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spilled) >= len(targets)
    assert set(spilled) == {("0", "0", "0")}, report


@needs_nvcc
@needs_extension
def test_the_extension_holds_what_nvcc_can_compile() -> None:
    from pi0_engine import _C

    assert set(_C.cuda_architectures()) <= set(map(int, constant("CUDA_ARCHITECTURES")))
    assert list(_C.cuda_architectures()) == sorted(_C.cuda_architectures())


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no C++ compiler {CXX!r} on PATH")
def test_the_kernel_run_by_cpu_threads_equals_the_loops(tmp_path: Path) -> None:
    kernel = (ROOT / "csrc/frames_to_patches.cu").read_text().replace("#include <cuda_runtime.h>", "")
    plain, launches = re.subn(r"(\w+)<<<(\w+), (\w+), .*>>>\((.*)\);", r"launch(\2, \3, [=] { \1(\4); });", kernel)
    assert launches == 1
    (tmp_path / "frames_to_patches.inc").write_text(plain)
    sources = ["tests/support/kernel_on_threads.cpp", *(f"csrc/{name}.cpp" for name in ("bilinear", "pack_frames"))]
    # The loops without the stub that stands for the kernel in a build without nvcc.
    command = [CXX, "-std=c++17", "-O1", "-ffp-contract=off", "-DPI0_CUDA_ARCHITECTURES=", "-Icsrc", f"-I{tmp_path}"]
    program = str(tmp_path / "program")
    build = [*command, *sources, "csrc/frames_to_patches.cpp", "-pthread", "-o", program]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(printed) == 5
    assert all(line.endswith(": equal") for line in printed), printed

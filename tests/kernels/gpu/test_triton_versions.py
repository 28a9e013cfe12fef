"""Every kernel of the full-size models, compiled for every target by the oldest and the newest supported Triton.

Nothing may spill or overflow in a shipped launch configuration. Half a minute of compiling per target; what Triton's
cache holds is not compiled again, so that a second run takes seconds. Always compiled are the three whose code differs
most: mma and asynchronous copies (sm_87), wgmma and TMA (sm_90), TMA without wgmma (sm_120), of them by the oldest
Triton sm_90; all others by `make test-full`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pi0_engine.kernels.availability import SAFE_TRITON

triton = pytest.importorskip("triton", reason="Triton is not installed")

OLDEST = SAFE_TRITON
full_size = pytest.mark.full_size


@pytest.fixture(scope="module")
def oldest() -> Iterator[Path]:
    """A folder with the oldest supported Triton and nothing else. 0.6 GB: not left for pytest to keep."""
    if triton.__version__ == OLDEST:
        pytest.skip(f"the installed Triton is {OLDEST}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*pip, "--target", folder, f"triton=={OLDEST}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot fetch Triton {OLDEST}: {done.stderr.strip()[-200:]}")
        yield Path(folder)


def compile_kernels(targets: str, *paths: Path, **environment: str) -> str:
    """What ``pi0-engine kernels`` prints with ``paths`` in front, without this process's interpreter mode."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pi0_engine.cli", "kernels", "--target", targets]
    # Not from the repository: Python would find its kernels/ folder first.
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "targets", ["sm_87,sm_90,sm_120", pytest.param("sm_80,sm_86,sm_89,sm_100,sm_110", marks=full_size)]
)
def test_installed_triton(targets: str) -> None:
    text = compile_kernels(targets)
    assert text.splitlines()[-1].endswith(f"for {len(targets.split(','))} targets, Triton {triton.__version__}")


@pytest.mark.parametrize("targets", ["sm_90", pytest.param("sm_80,sm_86,sm_87,sm_89,sm_100,sm_120", marks=full_size)])
def test_oldest_triton(targets: str, oldest: Path) -> None:
    text = compile_kernels(targets, oldest)
    assert text.splitlines()[-1].endswith(f"for {len(targets.split(','))} targets, Triton {OLDEST}")


@full_size
def test_oldest_triton_with_a_newer_ptxas(oldest: Path) -> None:
    """The ptxas that the oldest Triton brings does not know sm_110; on a Jetson Thor it is given the one of CUDA 13."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    if not ptxas.is_file():
        pytest.skip(f"Triton {triton.__version__} brings no {ptxas.name}")
    text = compile_kernels("sm_110", oldest, TRITON_PTXAS_BLACKWELL_PATH=str(ptxas))
    assert text.splitlines()[-1].endswith(f"for 1 targets, Triton {OLDEST}")

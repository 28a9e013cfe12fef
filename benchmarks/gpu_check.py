"""Everything that needs a GPU, in one command and a few minutes: ``make gpu``.

    python benchmarks/gpu_check.py --output build/gpu

Environment, build, every op verified, GPU tests, parity at full size, benchmarks, the captured graph, the profiler if
it is there, and torch.compile's turn last. Each part is a process with a time limit: whatever it does, the next one
runs. Needs torch, Triton, numpy and pytest; what needs more says so. Installs nothing into the Python that it is
given: the package is built into the output folder, or taken from this checkout where that is not possible.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from parts import Part, Runner, summary

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
#: The five ops that an inference spends most of its time in.
_PROFILED = [
    "rmsnorm_geglu",
    "linear_residual 544x2048x16384",
    "rmsnorm_mlp_residual 50x",
    "rmsnorm_qkv_rope 50x",
    "suffix_attention 50 q",
]
#: What the robot-facing shells around the engine add, and what they need beside torch.
_SHELLS = [PYTHON, "-m", "pi0_engine.cli", "bench", "--layers", "--config", "pi0", "--views", "3", "--runs", "100"]
_SHELLS += ["--device", "cuda", "--dtype", "bfloat16"]
_SERVING = ("msgpack", "prometheus_client", "tokenizers", "tqdm", "tyro", "websockets")
_OUR_KERNELS = "regex:^(linear|paired|mlp|attention|prompt)_kernel$"


def main() -> int:
    options = parse()
    if not _sees_gpu():
        print(f"no CUDA GPU: torch of {PYTHON} sees none, so there is nothing to check here")
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    log = output / "log.txt"
    log.unlink(missing_ok=True)
    os.environ.setdefault("PI0_ENGINE_COMMIT", options.commit)
    os.environ["PYTHONPATH"] = str(_link_package(options.work / "linked"))
    runner = Runner(log, options.budget, ROOT)
    runner.run(_environment("environment, from the checkout"))
    built = options.work.resolve() / "built"
    if runner.run(_build(built)).status == "PASS":
        os.environ["PYTHONPATH"] = str(built)
        runner.run(_environment("environment, as built"))
    for part in checks(output):
        runner.run(part)
    for command in ("benchmarks/tables.py", "benchmarks/plot_results.py"):
        print(flush=True)
        subprocess.run([PYTHON, command, str(output)], cwd=ROOT, check=False, timeout=60)
    table = summary(runner.outcomes)
    unsafe = re.search(r"^UNSAFE: .*$", log.read_text(), re.MULTILINE)  # by environment.py
    table += f"\n{unsafe[0]}" if unsafe else ""
    (output / "summary.txt").write_text(table + "\n")
    print(f"\nlog and results: {output}\n\n{table}")
    return 1 if any(outcome.failed for outcome in runner.outcomes) else 0


def checks(output: Path) -> list[Part]:
    """What follows the build, in the order of what is worth most if the time runs out."""
    kernels = [PYTHON, "benchmarks/bench_kernels.py"]
    policy = [PYTHON, "benchmarks/bench_policy.py", "--even-if-wrong", "--output", str(output)]
    slices = min(4, os.cpu_count() or 1)  # of each model: Triton compiles on the CPU
    every_op = [
        [*kernels, "--check", "--config", model, "--views", "1", "2", "3", "--slice", f"{i}/{slices}"]
        for model in ("pi0", "pi05")
        for i in range(slices)
    ]
    ncu = shutil.which("ncu") or next(iter(sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"))), None)
    profile = [str(ncu), "--clock-control", "none", "--kernel-name", _OUR_KERNELS]
    profile += [word for section in ("SpeedOfLight", "Occupancy", "LaunchStats") for word in ("--section", section)]
    profile += [*kernels, "--check", "--views", "2", "--only", *_PROFILED]
    engine = [*policy, "--parts", "engine", "eager", "--dot", str(output / "graph.dot")]
    return [
        Part("every op at full size, verified once", every_op, 90),
        _tests("GPU tests of the kernels", ["tests/kernels/gpu/test_*.py", "tests/csrc/test_cuda*.py"], 90),
        _tests("GPU tests of the engine", ["tests/engine/test_gpu*.py"], 80),
        Part("parity at full size", [[PYTHON, "benchmarks/gpu_parity.py"]], 80),
        Part("benchmark of the policy", [engine], 120),
        Part("nodes of the graph", [[PYTHON, "benchmarks/tables.py", "--graph", str(output)]], 20),
        Part("benchmark of the kernels", [[*kernels, "--views", "2", "--output", str(output)]], 60),
        Part("engine, policy and server, shell by shell", [_SHELLS], 40, skip=_missing(_SERVING), optional=True),
        Part("profile of five kernels", [profile], 60, skip=None if ncu else "there is no ncu", optional=True),
        Part("policy under torch.compile", [[*policy, "--parts", "compiled"]], 400, optional=True),
    ]


def _missing(packages: tuple[str, ...]) -> str | None:
    """Why a part is skipped, if one of its packages is not there."""
    missing = [package for package in packages if not _is_installed(package)]
    return f"{', '.join(missing)} is not installed" if missing else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="folder for the log and results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_work", help="folder for the built package")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--commit", default="unknown", help="for the results, where there is no git")
    return parser.parse_args()


def _environment(name: str) -> Part:
    smi = [["nvidia-smi"]] if shutil.which("nvidia-smi") else []
    return Part(name, [*smi, [PYTHON, "benchmarks/environment.py"]], 60)


def _build(target: Path) -> Part:
    shutil.rmtree(target, ignore_errors=True)
    command = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    return Part("build", [[*command, "--target", str(target), "."]], 100)


def _tests(name: str, patterns: list[str], limit_s: float) -> Part:
    """pytest on the files that exist; in several processes and with a limit per test where its plugins are there."""
    files = sorted(path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT))
    options = ["-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    if _is_installed("xdist"):
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    if _is_installed("pytest_timeout"):
        options += ["--timeout", "60", "--timeout-method", "thread"]
    skip = None if files else f"there is no {' or '.join(patterns)}"
    if not _is_installed("pytest"):
        skip = "not run: pytest is not installed"
    return Part(name, [[PYTHON, "-m", "pytest", *options, *files]], limit_s, skip=skip)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _link_package(folder: Path) -> Path:
    """The package as links into this checkout: what an editable installation would be, without the extension."""
    package = folder / "pi0_engine"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "python" / "pi0_engine").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("kernels", "engine"):
        (package / name).symlink_to(ROOT / name)
    return folder


def _sees_gpu() -> bool:
    """Asked of another process: this one must outlive whatever happens to the GPU."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([PYTHON, "-c", code], timeout=120, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


if __name__ == "__main__":
    sys.exit(main())

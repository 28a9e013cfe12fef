"""``make gpu`` as far as it can be tried without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_kernels
import bench_policy
import gpu_check
from parts import Part
from tests.support.paths import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert "no CUDA GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_every_command_is_one_that_its_script_takes(tmp_path: Path) -> None:
    parsers = {"benchmarks/bench_kernels.py": bench_kernels.parse, "benchmarks/bench_policy.py": bench_policy.parse}
    seen = set()
    for part in gpu_check.checks(tmp_path):
        for command in part.commands:
            scripts = [i for i, word in enumerate(command) if word.startswith("benchmarks/")]
            for at in scripts:
                assert (ROOT / command[at]).is_file()
                seen.add(command[at])
                if command[at] in parsers:
                    parsers[command[at]](list(command[at + 1 :]))
    assert set(parsers) < seen


def test_limits_leave_room_for_each_other(tmp_path: Path) -> None:
    """All but torch.compile, which takes what is left, could nearly run into their limits within the ten minutes."""
    limits = [part.limit_s for part in gpu_check.checks(tmp_path)]
    assert sum(limits[:-1]) <= 640


def test_profiled_ops_exist() -> None:
    """``--only`` takes parts of names: each must find an op of full-size π0 with two cameras."""
    options = bench_kernels.parse(["--views", "2"])
    config = bench_kernels.Pi0Config.load(options.config)
    bench = bench_kernels.Bench(config, torch.bfloat16, torch.device("cpu"), (2,), 32)
    labels = list(bench.problems())
    for wanted in gpu_check._PROFILED:
        assert any(wanted in label for label in labels), f"{wanted} is not in {labels}"


#: What `make gpu` does without.
_NOT_NEEDED = ("tyro", "hypothesis", "matplotlib", "huggingface_hub", "sentencepiece", "tokenizers", "transformers")


_BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def without(tmp_path: Path) -> dict[str, str]:
    """An environment in which none of them can be imported."""
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER.format(names=_NOT_NEEDED))
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_scripts_need_few_packages(tmp_path: Path) -> None:
    scripts = "bench_kernels, bench_policy, environment, gpu_check, gpu_parity, plot_results, tables"
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import {scripts}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=without(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    blocked = subprocess.run(
        [sys.executable, "-c", "import tyro"], env=without(tmp_path), capture_output=True, text=True
    )
    assert "tyro is blocked" in blocked.stderr


def test_gpu_tests_need_few_packages(tmp_path: Path) -> None:
    files = [
        word
        for part in gpu_check.checks(tmp_path)
        for command in part.commands
        for word in command
        if word.startswith("tests/")
    ]
    assert len(files) > 5
    options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=ROOT, env=without(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checkout_as_a_package(tmp_path: Path) -> None:
    code = "import pi0_engine, pi0_engine.kernels.registry, pi0_engine.engine.runtime; print(pi0_engine.__file__)"
    folder = gpu_check._link_package(tmp_path / "linked")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder / "pi0_engine" / "__init__.py")


def test_tests_that_are_not_there_are_skipped() -> None:
    part = gpu_check._tests("nothing", ["tests/test_there_is_no_such*.py"], 10)
    assert part.skip == "there is no tests/test_there_is_no_such*.py"


def python(code: str) -> list[list[str]]:
    return [[sys.executable, "-c", code]]


@pytest.mark.parametrize(("last", "status"), [("print('fine')", 0), ("raise SystemExit('broken')", 1)])
def test_parts_are_run_and_summed_up(
    last: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a build that fails, so that the checkout itself is what the parts import."""
    code = "import pi0_engine; print('from', pi0_engine.__file__)"
    monkeypatch.setattr(gpu_check, "_sees_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "_environment", lambda name: Part(name, python(code), 60))
    monkeypatch.setattr(
        gpu_check, "_build", lambda target: Part("build", python("raise SystemExit('no setuptools')"), 60)
    )
    monkeypatch.setattr(gpu_check, "checks", lambda output: [Part("last", python(last), 60, optional=False)])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    words = ["gpu_check.py", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--budget", "120"]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_check.main() == 1  # the build failed
    monkeypatch.setattr(gpu_check, "_build", lambda target: Part("build", [], 60, skip="not now"))
    assert gpu_check.main() == status
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:4] == ["1", "environment,", "from", "the"]
    assert str(tmp_path / "work" / "linked") in table[0]
    assert table[2].split()[2] == ("FAIL" if status else "PASS")
    assert (tmp_path / "out" / "summary.txt").read_text().splitlines() == table
    assert "from" in (tmp_path / "out" / "log.txt").read_text()

"""Parts of a long check: limits, failures, killed processes, the log. With real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from parts import Outcome, Part, Runner, summary


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "log.txt", budget_s=60, folder=tmp_path)


def test_a_part_that_passes(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = runner.run(Part("greeting", [python("print('hello'); print('=== all well ===')")], 30))
    assert (outcome.status, outcome.note, outcome.failed) == ("PASS", "all well", False)
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert "hello" not in capsys.readouterr().out


def test_a_part_that_fails_shows_its_end(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys\nfor i in range(100): print('line', i)\nsys.exit(3)"
    outcome = runner.run(Part("broken", [python(code)], 30))
    assert (outcome.status, outcome.note, outcome.failed) == ("FAIL", "exit status 3: line 99", True)
    shown = capsys.readouterr().out
    assert "line 70" in shown
    assert "line 69\n" not in shown


def test_a_hung_part_is_killed_with_its_children(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = f"import time, os; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import subprocess, sys, time
def hangs_here(): time.sleep(60)
print('begun', flush=True)
subprocess.Popen([sys.executable, '-c', {child!r}])
hangs_here()
"""
    started = time.monotonic()
    outcome = runner.run(Part("hung", [python(code)], 2))
    assert time.monotonic() - started < 30
    assert outcome.status == "TIMEOUT"
    assert "hangs_here" in capsys.readouterr().out  # the fault handler's traceback
    assert runner.run(Part("next", [python("print('still runs')")], 30)).status == "PASS"
    assert not alive(int((tmp_path / "child").read_text()))


def alive(pid: int) -> bool:
    """Not gone, and no zombie that nobody has waited for."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True


def test_commands_of_a_part_run_at_the_same_time(runner: Runner) -> None:
    """Each waits for a file that the other writes."""
    code = (
        "import pathlib, time\npathlib.Path('{}').touch()\nwhile not pathlib.Path('{}').exists(): time.sleep(0.02)\n"
        "print('met')"
    )
    commands = [python(code.format("a", "b")), python(code.format("b", "a"))]
    assert runner.run(Part("pair", commands, 30)).status == "PASS"
    failing = runner.run(Part("one fails", [python("print('fine')"), python("raise SystemExit('wrong')")], 30))
    assert (failing.status, failing.note) == ("FAIL", "exit status 1: wrong")


def test_nothing_begins_after_the_budget(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "log.txt", budget_s=0, folder=tmp_path)
    assert runner.run(Part("late", [python("print('no')")], 30)).status == "SKIPPED"


def test_skipped_and_optional_parts(runner: Runner) -> None:
    assert runner.run(Part("absent", [], 30, skip="there is no such tool")).note == "there is no such tool"
    assert not runner.run(Part("extra", [python("raise SystemExit(1)")], 30, optional=True)).failed


def test_the_summary_has_a_line_per_part() -> None:
    outcomes = [Outcome("build", "PASS", 3.21, "done"), Outcome("kernels", "TIMEOUT", 100.0, "killed")]
    assert summary(outcomes).splitlines() == [
        " 1 build    PASS       3.2 s  done",
        " 2 kernels  TIMEOUT  100.0 s  killed",
    ]

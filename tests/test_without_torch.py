"""A robot's side of the house, where torch and Triton cannot be imported: its own tests, and what a user is told.

The tests of these rooms run once more in a process with ``tests.support.no_torch``. What would need a network has one
that stands still there, or is skipped with that reason.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import get_args

import pytest

from pi0_engine.cli import Command
from tests.support.paths import ROOT, TESTS

#: What runs on a robot's computer.
ROOMS = (
    *("robots", "text", "images", "rtc/test_schedule.py", "recording", "client", "support/test_links.py"),
    *(
        f"serving/test_{name}.py"
        for name in ("asgi", "fleet", "protocol", "queue", "recovery", "review", "server", "wire")
    ),
)
COMMANDS = tuple(get_args(command)[0].__name__.lower() for command in get_args(Command))
#: A command's line for what needs torch.
BLOCKED = "import tests.support.no_torch, sys; from pi0_engine.cli import main; sys.exit(main(sys.argv[1:]))"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_tests_of_a_robots_side_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.no_torch", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *(str(TESTS / room) for room in ROOMS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 600, done.stdout[-1000:]


def test_torch_is_blocked_there() -> None:
    done = python("import tests.support.no_torch, torch")
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(command: tuple[str, ...]) -> None:
    done = python(BLOCKED, *command, "--help")
    assert done.returncode == 0 and "usage: pi0-engine" in done.stdout, done.stderr


def test_env_says_where_torch_is() -> None:
    done = python(BLOCKED, "env", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "pip install 'pi0-engine[torch]'" in report["versions"]["torch"]
    assert "pypi.jetson-ai-lab.io" in report["engine"]["device"] and "frames" in report["engine"]


def test_simulate() -> None:
    done = python(BLOCKED, "simulate", "--seconds", "1")
    assert done.returncode == 0 and "real-time chunking" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["bench", "--config", "pi0"], "pi0-engine bench"),
        (["verify", "--case", "none.npz"], "pi0-engine verify"),
        (["infer", "--robot", "libero", "--random-weights", "0", "--config", "pi0"], "a model"),
        (["serve", "--robot", "libero", "--random-weights", "0", "--config", "pi0", "--port", "0"], "a policy server"),
    ],
)
def test_what_needs_torch_says_so_in_a_sentence(arguments: list[str], what: str) -> None:
    done = python(BLOCKED, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"pi0-engine: error: {what} needs torch, which is not installed: pip install "), last


@pytest.mark.parametrize("name", ["Engine", "open_checkpoint"])
def test_public_names_that_need_torch_say_so(name: str) -> None:
    done = python(f"import tests.support.no_torch, pi0_engine; pi0_engine.{name}")
    assert f"pi0_engine.{name} needs torch, which is not installed: pip install" in done.stderr


def test_a_policy_without_an_engine_says_so() -> None:
    code = "import tests.support.no_torch, pi0_engine; pi0_engine.Pi0Policy.from_checkpoint('x', robot='libero')"
    assert "Pi0Policy.from_checkpoint needs torch" in python(code).stderr

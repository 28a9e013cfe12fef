"""Parts of a long check as processes of their own: each has a time limit, none can stall or break the next."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

#: Lines of a failed part that are shown at once, of all its commands together; the log has all.
_TAIL = 30
#: Seconds between asking a process for a traceback and killing it, and to wait for a killed one.
_GRACE = 5.0
#: A part with less time than this is not begun.
_SHORTEST = 5.0


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        commands: run at the same time; the part passes if all do.
        limit_s: after which they are killed.
        skip: why there is nothing to run, if so.
        optional: whether a failure leaves the whole check passed.
    """

    name: str
    commands: Sequence[Sequence[str]]
    limit_s: float
    skip: str | None = None
    optional: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """``status``: PASS, FAIL, TIMEOUT or SKIPPED. ``note``: the last line that the part printed, or why not."""

    name: str
    status: str
    seconds: float
    note: str
    optional: bool = False

    @property
    def failed(self) -> bool:
        return self.status in ("FAIL", "TIMEOUT") and not self.optional


class Runner:
    """Runs parts one after the other within one budget of time, and keeps their output in one log.

    Args:
        log: a file to append to.
        budget_s: for all parts together, from now on.
        folder: where the parts run.
    """

    def __init__(self, log: Path, budget_s: float, folder: Path) -> None:
        self.outcomes: list[Outcome] = []
        self._log, self._folder = log, folder
        self._end = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, part: Part) -> Outcome:
        """Run it, print a header and how it ended, and add the outcome to ``outcomes``."""
        number = len(self.outcomes) + 1
        print(f"\n== {number} {part.name}", flush=True)
        if part.skip is not None:
            outcome = Outcome(part.name, "SKIPPED", 0.0, part.skip, part.optional)
        elif self.left_s < _SHORTEST:
            outcome = Outcome(part.name, "SKIPPED", 0.0, "no time is left", part.optional)
        else:
            outcome = self._run(number, part)
        self.outcomes.append(outcome)
        print(f"{outcome.status} in {outcome.seconds:.1f} s: {outcome.note}", flush=True)
        return outcome

    def _run(self, number: int, part: Part) -> Outcome:
        started = time.monotonic()
        limit = min(part.limit_s, self.left_s)
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **part.environment}
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile("w+b")) for _ in part.commands]
            running = [
                subprocess.Popen(
                    command,
                    cwd=self._folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command, output in zip(part.commands, outputs, strict=True)
            ]
            late = _wait(running, started + limit)
            seconds = time.monotonic() - started
            texts = [_text(output) for output in outputs]
        codes = [process.returncode for process in running]
        self._write(number, part, texts, codes)
        if late:
            status, note = "TIMEOUT", f"killed after {limit:.0f} s; last: {_last_line(texts[late[0]])}"
        elif any(codes):
            first = next(i for i, code in enumerate(codes) if code)
            status, note = "FAIL", f"exit status {codes[first]}: {_last_line(texts[first])}"
        else:
            status, note = "PASS", _last_line(texts[-1])
        if status != "PASS":
            shown = max(8, _TAIL // sum(bool(code) or i in late for i, code in enumerate(codes)))
            for i, (text, code) in enumerate(zip(texts, codes, strict=True)):
                if code or i in late:
                    print(f"-- {' '.join(part.commands[i])}")
                    print("\n".join(text.rstrip().splitlines()[-shown:]), flush=True)
        return Outcome(part.name, status, seconds, note, part.optional)

    def _write(self, number: int, part: Part, texts: list[str], codes: list[int | None]) -> None:
        with self._log.open("a") as log:
            log.write(f"\n===== {number} {part.name}\n")
            for command, text, code in zip(part.commands, texts, codes, strict=True):
                log.write(f"----- {' '.join(command)}\n{text.rstrip()}\n----- exit status {code}\n")


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line per part."""
    width = max((len(o.name) for o in outcomes), default=0)
    lines = [
        f"{i:>2} {o.name.ljust(width)}  {o.status.ljust(7)}{o.seconds:>7.1f} s  {o.note[:150]}"
        for i, o in enumerate(outcomes, start=1)
    ]
    return "\n".join(lines)


def _wait(running: list[subprocess.Popen[bytes]], end: float) -> list[int]:
    """Wait for all, until ``end``; kill the late ones with everything they started. Returns which those were."""
    late = []
    for i, process in enumerate(running):
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(i)
    for i in late:
        with contextlib.suppress(ProcessLookupError):
            running[i].send_signal(signal.SIGABRT)  # Python's fault handler says where it hangs
    for i in late:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[i].wait(_GRACE)
    for process in running:  # also what a finished one left behind
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for i in late:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may not die
            running[i].wait(_GRACE)
    return late


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace").replace("\r", "\n")


def _last_line(text: str) -> str:
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    return lines[-1] if lines else "it printed nothing"

"""Hostile clients against a real server while good ones go on working: ``make fuzz`` for the long run.

    python -m tests.support.fuzz_server --messages 100000 --seed 0

Fails if an answer of a good client is wrong or late, if a hostile message is met with silence or without a code, if a
broken connection is not ended as it must be, or if the server crashes, hangs or grows.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import websockets.exceptions
import websockets.sync.client as websocket
from tqdm import tqdm

from pi0_engine.serving.errors import CODES
from pi0_engine.serving.wire import packb, unpackb
from tests.support.hostile import abuse_connection, hold_connections, leave_handshakes_open, message
from tests.support.serving import PATIENCE_S, noise, observation, one_thread, policy, process

#: Hostile senders, and good clients beside them.
SENDERS, GOOD = 4, 2
#: What a good client allows for an answer. Far above what one takes: the machine may be busy with other things too.
DEADLINE_MS = 2000.0


@dataclass
class Report:
    """What came of it.

    Attributes:
        codes: answers to hostile messages, by code; ``answered`` where one was usable, ``closed N`` by close code.
        endings: of broken connections: HTTP status, close code, ``closed``, or ``left`` by the client.
        good: of each right answer within its deadline, the milliseconds that it took.
        growth_mb: memory of the server's process at the end less that after its first answers.
        problems: what must not happen.
    """

    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    endings: collections.Counter[str] = field(default_factory=collections.Counter)
    good: list[float] = field(default_factory=list)
    growth_mb: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def messages(self) -> int:
        return sum(self.codes.values())


def fuzz(messages: int, seed: int, *, progress: bool = False) -> Report:
    """Send so many hostile messages, and as many broken connections as fit in between."""
    report, done = Report(), threading.Event()
    with tempfile.TemporaryDirectory() as folder, process(Path(folder)) as (server, port):
        expected = [_expected(k) for k in range(8)]
        good = [
            threading.Thread(target=_guarded, args=(report, _good_client, port, k, expected, report, done))
            for k in range(GOOD)
        ]
        for thread in good:
            thread.start()
        _wait_for(lambda: len(report.good) >= 50 or bool(report.problems))
        before = _resident_mb(server.pid)
        with tqdm(total=messages, unit="message", disable=None if progress else True) as bar:
            senders = [
                threading.Thread(
                    target=_guarded, args=(report, _hostile_sender, port, (seed, k), messages // SENDERS, report, bar)
                )
                for k in range(SENDERS)
            ]
            others = [
                threading.Thread(target=_guarded, args=(report, _abuser, port, seed, report, done)),
                threading.Thread(target=_guarded, args=(report, hold_connections, port, 6, done.is_set)),
                threading.Thread(target=_guarded, args=(report, leave_handshakes_open, port, done.is_set)),
            ]
            for thread in senders + others:
                thread.start()
            for thread in senders:
                thread.join()
            done.set()
        for thread in others + good:
            thread.join(PATIENCE_S)
            if thread.is_alive():
                report.problems.append("a client hangs")
        report.growth_mb = _resident_mb(server.pid) - before
        if server.poll() is not None:
            report.problems.append(f"the server ended with {server.returncode}")
        server.terminate()
        if server.wait(PATIENCE_S) != 0:
            report.problems.append(f"SIGTERM ended the server with {server.returncode}")
        log = (Path(folder) / "log").read_text()
        if "Traceback" in log:
            report.problems.append(f"the log has a traceback:\n{log[log.index('Traceback') :][:2000]}")
    return report


def _expected(turn: int) -> Any:
    with one_thread():  # as the server
        return policy().infer(observation(seed=turn), noise=noise(np.random.default_rng(turn)))["actions"]


def _guarded(report: Report, target: Any, *arguments: Any) -> None:
    try:
        target(*arguments)
    except Exception as error:
        report.problems.append(f"{target.__name__}: {type(error).__name__}: {error}")


def _good_client(port: int, number: int, expected: list[Any], report: Report, done: threading.Event) -> None:
    with websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
        connection.recv(PATIENCE_S)
        turn = number
        while not done.is_set():
            turn = (turn + 1) % len(expected)
            controls = {"seed": turn, "request": turn, "deadline_ms": DEADLINE_MS}
            started = time.perf_counter()
            connection.send(packb({**observation(seed=turn), "pi0_engine": controls}))
            answer = connection.recv(PATIENCE_S)
            if isinstance(answer, str):
                raise AssertionError(f"a good observation was refused: {answer}")
            reply = unpackb(answer)
            if not np.array_equal(reply["actions"], expected[turn]) or reply["request"] != turn:
                raise AssertionError("a good observation got a wrong answer")
            if not reply["deadline"]["met"]:
                raise AssertionError(f"a deadline was missed: {reply['deadline']}")
            report.good.append(1e3 * (time.perf_counter() - started))


def _hostile_sender(port: int, seed: tuple[int, int], count: int, report: Report, bar: Any) -> None:
    random, sent = np.random.default_rng(seed), 0
    while sent < count:
        with websocket.connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
            connection.recv(PATIENCE_S)
            for _ in range(min(200, count - sent)):
                sent += 1
                bar.update()
                try:
                    connection.send(message(random))
                    report.codes[_read(connection.recv(PATIENCE_S))] += 1
                except websockets.exceptions.ConnectionClosed as closed:
                    assert closed.rcvd is not None, "closed without a code"
                    report.codes[f"closed {closed.rcvd.code}"] += 1
                    break


def _read(answer: str | bytes) -> str:
    if isinstance(answer, bytes):
        assert "actions" in unpackb(answer) or unpackb(answer)["reset"]
        return "answered"
    refusal = json.loads(answer)
    assert refusal["code"] in CODES and refusal["message"] and "Traceback" not in refusal["message"], answer
    return str(refusal["code"])


def _abuser(port: int, seed: int, report: Report, done: threading.Event) -> None:
    random = np.random.default_rng((seed, 1000))
    for number in itertools.count():
        if done.is_set():
            return
        report.endings[abuse_connection(port, random, number)] += 1
        done.wait(0.01)


def _wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    report = fuzz(given.messages, given.seed, progress=True)
    seconds = time.monotonic() - started
    print(f"{report.messages} hostile messages and {report.endings.total()} broken connections in {seconds:.0f} s")
    for code, count in report.codes.most_common() + report.endings.most_common():
        print(f"  {count:7d}  {code}")
    if report.good:
        p50, p99 = np.percentile(report.good, [50, 99])
        print(f"{len(report.good)} right answers to good clients meanwhile, in {p50:.1f} ms (p50), {p99:.1f} ms (p99)")
    print(f"the server's memory grew by {report.growth_mb:.1f} MB")
    for problem in report.problems:
        print(f"PROBLEM: {problem}")
    return 1 if report.problems or report.growth_mb > 50 else 0


if __name__ == "__main__":
    sys.exit(main())

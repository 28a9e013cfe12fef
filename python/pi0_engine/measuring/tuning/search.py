"""Measure launch configurations on the GPU at hand: every candidate is checked against the op's meaning, then timed.

A case is what one rule can be written for. Its candidates run the real op on random numbers of the real shapes, with
other weights in every call, so that weights come from memory as they do in the engine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs, Rule
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.gpu.target import Target
from pi0_engine.kernels.registry import OpFunction, select_ops
from pi0_engine.kernels.stream import Scratch
from pi0_engine.measuring.op_calls import Arguments, OpCall, expected_outputs, fill, repeated, verify
from pi0_engine.measuring.timing import call_seconds, l2_bytes
from pi0_engine.measuring.tuning.candidates import candidates, refinements
from pi0_engine.measuring.tuning.cases import Case

#: A candidate replaces the present configuration where it takes less than this share of its time.
_WORTH = 0.98
#: Calls in the graph that times a candidate.
_CALLS = 20


@dataclass(frozen=True)
class Outcome:
    """What was found for a case.

    Attributes:
        present, best: configurations; the same where nothing was faster or nothing was tried.
        present_seconds, best_seconds: per call; 0 where the case was not reached.
        tried: configurations timed, the present configuration included.
        dropped: those that were not timed or gave wrong results, with the reason.
        finished: whether all candidates were tried before the time was up.
    """

    case: Case
    present: LaunchConfig
    best: LaunchConfig
    present_seconds: float
    best_seconds: float
    tried: int
    dropped: list[str]
    finished: bool


def tune(
    cases: list[Case],
    base: LaunchConfigs,
    target: Target,
    device: torch.device,
    *,
    budget_seconds: float,
    limit: int,
    progress: bool = False,
) -> Iterator[Outcome]:
    """Outcomes, those cases first that take most time in an inference; cases that time does not suffice for are last.

    Args:
        cases: from :func:`find_cases`.
        base: the present rules. What is found for one case is in use while the next is measured.
        device: a GPU; on a CPU Triton's interpreter runs, which shows that a candidate is right, not how fast it is.
        limit: candidates of each case, beside the present configuration.
    """
    deadline = time.monotonic() + budget_seconds
    bench = _Bench(base, target, device)
    bar = functools.partial(tqdm, disable=not progress, leave=False)
    present = {case.key: bench.measure(case, bench.present(case)) for case in bar(cases, "present configurations")}
    # Where the present configuration fails, nothing is more urgent.
    ordered = sorted(cases, key=lambda case: -case.count * _seconds(present[case.key], failed=math.inf))
    for case in bar(ordered, "tuning"):
        if time.monotonic() < deadline:
            yield bench.search(case, limit, deadline)
        else:
            config, seconds = bench.present(case), _seconds(present[case.key], failed=0.0)
            yield Outcome(case, config, config, seconds, seconds, 0, [], False)


class _Bench:
    """Runs single cases under trial configurations."""

    def __init__(self, base: LaunchConfigs, target: Target, device: torch.device) -> None:
        self._base, self._target, self._device = base, target, device
        self._found: list[Rule] = []
        self._scratch = Scratch.allocate(device, needed=True)
        #: Of the case at hand: what its calls should give, by their keys.
        self._expected: tuple[Case, dict[tuple[Any, ...], Arguments]] | None = None

    def present(self, case: Case) -> LaunchConfig:
        """As a launcher would hand it out."""
        rows, n, k = case.rows, case.problem.n, case.k
        return self._launcher([]).config(case.op, rows=rows, n=n, k=k)

    def search(self, case: Case, limit: int, deadline: float) -> Outcome:
        present, times, dropped = self.present(case), dict[LaunchConfig, float](), list[str]()

        def attempt(configs: Sequence[LaunchConfig]) -> bool:
            for config in configs:
                if times and time.monotonic() >= deadline:
                    return False
                if config not in times:
                    result = self.measure(case, config)
                    if isinstance(result, str):
                        dropped.append(f"{_short(config)}: {result}")
                    else:
                        times[config] = result
            return True

        finished = attempt(candidates(case.problem, present, self._target, limit))
        if times and finished:
            best = min(times, key=lambda config: times[config])
            finished = attempt(refinements(case.problem, best, self._target))
        if not times:
            return Outcome(case, present, present, 0.0, 0.0, 0, dropped, finished)
        best = min(times, key=lambda config: times[config])
        if present in times and times[best] > _WORTH * times[present]:
            best = present
        self._found.append(Rule(case.op, best, "", max_rows=case.rows, n=case.n, k=case.k))
        self._found.sort(key=lambda rule: rule.max_rows or 0)  # the first that fits is used
        return Outcome(case, present, best, times.get(present, 0.0), times[best], len(times), dropped, finished)

    def measure(self, case: Case, config: LaunchConfig) -> float | str:
        """Seconds per call, or why there is none."""
        trial = Rule(case.op, config, "", max_rows=case.rows, n=case.n, k=case.k)
        ops = select_ops("triton", self._device, self._launcher([trial, *self._found]))
        if self._expected is None or self._expected[0] is not case:
            self._expected = case, {}
        total, failure = 0.0, None
        for call, count in case.calls:
            try:
                total += count * self._time(getattr(ops, call.op), call, self._expected[1])
            except Exception as error:  # wrong, or whatever Triton's compiler raises: too much shared memory, ...
                failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # after a fault nothing can be measured: let it be seen
            if failure:
                return failure
        return total / case.count

    def _time(self, function: OpFunction, call: OpCall, expected: dict[tuple[Any, ...], Arguments]) -> float:
        on_gpu = self._device.type == "cuda"
        with torch.inference_mode():
            arguments = fill(call, self._device, self._scratch)  # the same in every call
            if call.key not in expected:
                expected[call.key] = expected_outputs(call.op, arguments)
            verify(call, function, arguments, expected[call.key])
            calls = repeated(function, arguments, _CALLS if on_gpu else 1, l2_bytes(self._device))
        return statistics.median(call_seconds(calls, self._device, repeats=10 if on_gpu else 1))

    def _launcher(self, rules: list[Rule]) -> Launcher:
        return Launcher(self._target, LaunchConfigs([*rules, *self._base.rules]), concurrent=self._device.type != "cpu")


def measured_rules(outcomes: Sequence[Outcome], device_name: str, date: str) -> list[Rule]:
    """One rule per case that was measured, ordered as they must be found.

    A rule reaches halfway to the next number of rows measured for the same op, n and k, the last one to twice its own.
    """
    measured = sorted((o for o in outcomes if o.tried), key=lambda o: (o.case.op, o.case.n or 0, o.case.k, o.case.rows))
    rules = []
    for index, outcome in enumerate(measured):
        case = outcome.case
        following = [o.case for o in measured[index + 1 : index + 2]]
        same = [c for c in following if (c.op, c.n, c.k) == (case.op, case.n, case.k)]
        reach = (case.rows + same[0].rows) // 2 if same else 2 * case.rows
        source = f"measured {date}, {device_name}, {1e6 * outcome.best_seconds:.1f} us"
        if outcome.best != outcome.present and outcome.present_seconds:
            source += f" (was {1e6 * outcome.present_seconds:.1f})"
        rules.append(Rule(case.op, outcome.best, source, max_rows=reach, n=case.n, k=case.k))
    return rules


def merge_rules(measured: Sequence[Rule], base: LaunchConfigs) -> LaunchConfigs:
    """Measured rules first, then the present ones, less those that would never be reached."""
    new = {(rule.op, rule.n, rule.k, rule.max_rows) for rule in measured}
    kept = [rule for rule in base.rules if (rule.op, rule.n, rule.k, rule.max_rows) not in new]
    return LaunchConfigs([*measured, *kept])


def _seconds(result: float | str, failed: float) -> float:
    return failed if isinstance(result, str) else result


def _short(config: LaunchConfig) -> str:
    values = dataclasses.asdict(config).items()
    return " ".join(f"{name}={value}" for name, value in values if value not in (False, 0))

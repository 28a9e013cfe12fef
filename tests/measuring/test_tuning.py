"""pi0-engine tune: which problems there are, legal candidates only, and rules that are found as they are meant."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pi0_engine.cli import main
from pi0_engine.commands.tune import describe, report_text, select_cases
from pi0_engine.config import Pi0Config
from pi0_engine.engine.plan import GPU_PROMPT_BUCKET, ShapePlan
from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs, Rule, configs_for
from pi0_engine.kernels.gpu.target import TARGETS
from pi0_engine.measuring.op_calls import OpCall
from pi0_engine.measuring.tuning import search
from pi0_engine.measuring.tuning.candidates import (
    ATTENTION,
    Problem,
    candidates,
    expected_clocks,
    is_legal,
    refinements,
    shared_bytes,
)
from pi0_engine.measuring.tuning.cases import Case, find_cases
from pi0_engine.measuring.tuning.search import Outcome, measured_rules, merge_rules, tune
from tests.support.paths import ROOT

CPU = torch.device("cpu")
PLAIN = LaunchConfig(64, 64, 64)


@functools.cache
def full_size_cases(arch: int = 90) -> list[Case]:
    pytest.importorskip("triton")
    config = Pi0Config("pi0")
    plans = [
        ShapePlan.of(config, views=[views], prompt_lengths=[20], num_steps=2, prompt_bucket=GPU_PROMPT_BUCKET)
        for views in (1, 2)
    ]
    return find_cases(config, plans, torch.bfloat16, TARGETS[arch], configs_for(arch)[0])


def test_the_cases_of_full_size_pi0() -> None:
    cases = {case.label: case for case in full_size_cases()}
    # Both views ask for the expert's shapes; the first of two steps has the state token's row.
    assert cases["linear_residual 50x1024x2048"].count == 2 * 18
    assert cases["linear_residual 51x1024x2048"].count == 2 * 18
    assert cases["mlp_up 50x8192x1024"].calls[0][0].op == "rmsnorm_mlp_residual"
    assert cases["mlp_down 50x1024x4096"].problem.writes_stream
    assert not cases["mlp_up 50x8192x1024"].problem.writes_stream
    assert cases["rmsnorm_geglu 288x32768x2048"].count == cases["rmsnorm_geglu 544x32768x2048"].count == 17
    # One rule of attention serves prefixes of any length: it is tuned on the longest, measured on all.
    suffix = cases["suffix_attention 400xanyx256"]
    assert suffix.problem.n == 544 and len({call.key for call, _ in suffix.calls}) == 3
    assert cases["vision_attention 256xanyx72"].problem.instances == 2 * 16
    assert cases["linear 50x1024x32"].problem.element_bytes == 4
    assert cases["patch_embed 512x1152x588"].problem.writes_stream


@pytest.mark.parametrize("arch", TARGETS)
def test_candidates_are_legal_and_begin_with_the_present_one(arch: int) -> None:
    target, base = TARGETS[arch], configs_for(arch)[0]
    for case in full_size_cases():
        problem = case.problem
        present = base.find(case.op, rows=case.rows, n=problem.n, k=case.k)
        found = candidates(problem, present, target, 10)
        assert found[0] == present and 2 <= len(found) <= 11 and len(set(found)) == len(found), case.label
        clocks = [expected_clocks(problem, config, target) for config in found[1:]]
        assert clocks == sorted(clocks)
        for config in [*found[1:], *refinements(problem, found[1], target)]:
            assert min(config.block_m, config.block_n) >= 16
            assert not problem.writes_stream or config.block_n % 64 == 0
            assert shared_bytes(problem, config) <= target.shared_bytes
            assert arch >= 90 or not (config.tma or config.pdl)
            assert case.op in (*ATTENTION, "embed_prompt") or config.block_k >= 16
            assert case.op != "mlp_up" or config.splits == 1
            assert case.op != "mlp_down" or (config.warps, config.stages) == (present.warps, present.stages)
            assert config.ahead_bytes == present.ahead_bytes


@pytest.mark.parametrize("arch", TARGETS)
def test_what_is_shipped_is_legal(arch: int) -> None:
    for case in full_size_cases():
        config = configs_for(arch)[0].find(case.op, rows=case.rows, n=case.problem.n, k=case.k)
        assert is_legal(case.problem, config, TARGETS[arch]), (case.label, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_m": 8},
        {"block_n": 48},
        {"block_n": 32},  # a stream's partial sums span 64 columns
        {"block_k": 8},
        {"warps": 3},
        {"stages": 0},
        {"stages": 9},
        {"splits": 0},
        {"splits": 40},  # more than there are steps
        {"block_m": 128, "block_n": 256, "warps": 4},  # registers
        {"block_k": 256, "block_m": 128, "stages": 6},  # shared memory
    ],
)
def test_illegal_configurations(changes: dict[str, Any]) -> None:
    problem = Problem("linear_residual", 50, 1024, 2048, writes_stream=True)
    assert is_legal(problem, PLAIN, TARGETS[90])
    assert not is_legal(problem, dataclasses.replace(PLAIN, **changes), TARGETS[90])


def test_old_gpus_have_neither_tma_nor_early_starts() -> None:
    problem = Problem("linear", 50, 1024, 2048)
    for feature in ("tma", "pdl"):
        config = dataclasses.replace(PLAIN, **{feature: True})
        assert is_legal(problem, config, TARGETS[90]) and not is_legal(problem, config, TARGETS[87])
    assert not is_legal(
        Problem("linear", 50, 1024, 588, element_bytes=2), dataclasses.replace(PLAIN, tma=True), TARGETS[90]
    )


def case(op: str, rows: int, n: int | None, k: int, count: int = 1) -> Case:
    return Case(op, rows, n, k, Problem(op, rows, n or 600, k), [(None, count)])  # type: ignore[list-item]


def outcome(of: Case, best: LaunchConfig = PLAIN, seconds: float = 5e-6, tried: int = 3) -> Outcome:
    return Outcome(of, LaunchConfig(16, 16, 16), best, 6e-6, seconds, tried, [], True)


def test_a_rule_reaches_halfway_to_the_next_measured_number_of_rows() -> None:
    many, few = dataclasses.replace(PLAIN, block_m=128), dataclasses.replace(PLAIN, block_m=16)
    found = [
        outcome(case("linear", 544, 2048, 1024), many),
        outcome(case("linear", 288, 2048, 1024), few),
        outcome(case("linear", 50, 32, 64)),
        outcome(case("suffix_attention", 400, None, 256)),
        outcome(case("embed_prompt", 32, 2048, 0), tried=0),  # not reached
    ]
    rules = measured_rules(found, "a GPU", "2026-01-02")
    assert [(rule.op, rule.n, rule.max_rows) for rule in rules] == [
        ("linear", 32, 100),
        ("linear", 2048, 416),
        ("linear", 2048, 1088),
        ("suffix_attention", None, 800),
    ]
    assert rules[0].source == "measured 2026-01-02, a GPU, 5.0 us (was 6.0)"
    general = LaunchConfigs([Rule("linear", LaunchConfig(32, 32, 32), "reasoned")])
    merged = merge_rules(rules, general)
    assert merged.find("linear", rows=300, n=2048, k=1024) == few
    assert merged.find("linear", rows=600, n=2048, k=1024) == many
    assert merged.find("linear", rows=2000, n=2048, k=1024) == LaunchConfig(32, 32, 32)
    assert merged.find("linear", rows=50, n=32, k=128) == LaunchConfig(32, 32, 32)


def test_measuring_again_replaces_and_survives_a_file(tmp_path: Path) -> None:
    base = configs_for(90)[0]
    first = merge_rules(measured_rules([outcome(case("linear", 50, 1024, 32))], "a GPU", "2026-01-02"), base)
    better = dataclasses.replace(PLAIN, block_m=32)
    second = merge_rules(measured_rules([outcome(case("linear", 50, 1024, 32), better)], "a GPU", "2026-01-03"), first)
    assert len(second.rules) == len(first.rules) == len(base.rules) + 1
    second.save(tmp_path / "tuned.json")
    again = LaunchConfigs.load(tmp_path / "tuned.json")
    assert again.rules == second.rules and again.find("linear", rows=50, n=1024, k=32) == better


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Instead of measuring: tiles of 128 rows are wrong, larger tiles are faster, up to nothing for the smallest op."""
    log: dict[str, list[str]] = {"measured": []}

    def measure(self: Any, of: Case, config: LaunchConfig) -> float | str:
        log["measured"].append(of.op)
        if config.block_m == 128:
            return "wrong: relative L2 1.0e+00"
        return {"linear": 4e-6, "rmsnorm_geglu": 1e-4, "patch_embed": 1e-7}[of.op] / (1 + 1e-6 * config.block_m)

    monkeypatch.setattr(search._Bench, "measure", measure)
    return log


def tuned(cases: list[Case], budget: float = 60, limit: int = 6) -> list[Outcome]:
    base, target = configs_for(90)[0], TARGETS[90]
    return list(tune(cases, base, target, CPU, budget_seconds=budget, limit=limit))


def test_what_takes_longest_in_an_inference_is_tuned_first(fake_times: dict[str, list[str]]) -> None:
    cases = [
        case("linear", 50, 1024, 1024, 10),
        case("patch_embed", 512, 1152, 588),
        case("rmsnorm_geglu", 544, 32768, 2048, 17),
    ]
    found = tuned(cases)
    assert [o.case.op for o in found] == ["rmsnorm_geglu", "linear", "patch_embed"]
    assert all(o.finished and o.tried > 3 for o in found[1:])
    # A difference below 2 % is noise: the present configuration stays.
    assert all(o.best == o.present for o in found if o.present_seconds)


def test_a_wrong_candidate_is_reported_and_never_chosen(fake_times: dict[str, list[str]]) -> None:
    (found,) = tuned([case("rmsnorm_geglu", 544, 32768, 2048)])
    assert found.present.block_m == 128 and found.present_seconds == 0
    assert found.best.block_m < 128 and found.dropped and all("wrong" in reason for reason in found.dropped)
    text = report_text(
        {
            "device": "a GPU",
            "arch": 90,
            "dtype": "bfloat16",
            "started_from": "sm_90",
            "output": "x.json",
            "cases": [describe(found)],
        }
    )
    assert "candidates gave wrong results" in text and "block_m=128" in text


def test_what_time_does_not_suffice_for_stays_as_it_is(fake_times: dict[str, list[str]]) -> None:
    found = tuned([case("linear", 50, 1024, 1024), case("patch_embed", 512, 1152, 588)], budget=0)
    assert [(o.tried, o.finished) for o in found] == [(0, False)] * 2 and all(o.best == o.present for o in found)
    assert fake_times["measured"] == ["linear", "patch_embed"]  # the present configurations, for the report
    assert measured_rules(found, "a GPU", "2026-01-02") == []
    report = {"device": "a GPU", "arch": 90, "dtype": "bfloat16", "started_from": "sm_90", "output": "x.json"}
    text = report_text({**report, "cases": [describe(o) for o in found]})
    assert text.count("not reached") == 2 and "2 problems were not finished" in text


def test_a_candidate_that_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    config = Pi0Config("pi0")
    plan = ShapePlan.of(config, views=[1], prompt_lengths=[20], num_steps=1)
    base = configs_for(80)[0]
    cases = [c for c in find_cases(config, [plan], torch.float32, TARGETS[80], base) if c.op == "rmsnorm_linear_euler"]

    def fails(self: Any, function: Any, call: OpCall, expected: Any) -> float:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(search._Bench, "_time", fails)
    monkeypatch.setattr(search, "select_ops", lambda *_: type("Ops", (), {"rmsnorm_linear_euler": None})())
    (found,) = tune(cases, base, TARGETS[80], CPU, budget_seconds=60, limit=1)
    assert found.tried == 0 and found.best == found.present
    assert found.dropped[0].endswith("RuntimeError: out of resource: shared memory")


def test_selecting_ops() -> None:
    cases = [case("linear", 50, 1024, 1024), case("mlp_up", 50, 8192, 1024)]
    assert select_cases(cases, ()) == cases and select_cases(cases, ("mlp_up",)) == cases[1:]
    with pytest.raises(ValueError, match=r"nothing to tune for op \['gemm'\], expected some of \['linear', 'mlp_up'\]"):
        select_cases(cases, ("gemm",))


INTERPRETED = """
import json, sys, torch
from tests.support.models import small_config
from pi0_engine.measuring import op_calls
from pi0_engine.measuring.tuning import search
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.kernels.gpu.configs import configs_for
from pi0_engine.kernels.gpu.target import TARGETS
from pi0_engine.measuring.tuning.cases import find_cases

config, target, base = small_config("pi0"), TARGETS[80], configs_for(80)[0]
plan = ShapePlan.of(config, views=[1], prompt_lengths=[3], num_steps=1)
cases = [c for c in find_cases(config, [plan], torch.float32, target, base) if c.op in ("mlp_down", "suffix_attention")]
# The kernels are right; one that looks wrong must be dropped.
search.refinements = lambda problem, best, target: []
found = list(search.tune(cases, base, target, torch.device("cpu"), budget_seconds=600, limit=1))
op_calls.AGREEMENT[torch.float32] = 1e-12
found += search.tune(cases[:1], base, target, torch.device("cpu"), budget_seconds=600, limit=1)
search.measured_rules(found[:2], "interpreter", "2026-01-02")
print(json.dumps([[o.case.op, o.tried, o.present_seconds, o.dropped] for o in found]))
"""


def test_candidates_run_are_checked_and_timed_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    *right, wrong = json.loads(run.stdout)
    assert sorted(op for op, *_ in right) == ["mlp_down", "suffix_attention"]
    assert all(tried == 2 and seconds > 0 and not dropped for _, tried, seconds, dropped in right)
    assert wrong[1] == 0 and len(wrong[3]) == 2 and all("wrong: out is off by" in reason for reason in wrong[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tuning measures on an NVIDIA GPU"),
        (["--budget-seconds", "0"], "budget seconds 0"),
        (["--candidates", "0"], "candidates is 0"),
    ],
)
def test_without_a_gpu_there_is_nothing_to_tune(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


@pytest.mark.parametrize("command", ["profile", "tune"])
def test_help_pages(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert "--launch-configs" in capsys.readouterr().out

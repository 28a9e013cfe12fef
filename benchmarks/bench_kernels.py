"""Every op of an inference at its real shapes: ours, the torch meaning (cuBLAS, SDPA), flash-attn, the bare library.

    python benchmarks/bench_kernels.py --config pi0 --views 2        # a table, and JSON with --output
    pytest benchmarks/bench_kernels.py --kernels-config pi0          # the same through pytest-benchmark

Verified against the meaning in float64 first. Weights are cold: a captured graph calls the op on so many copies that
none is found in L2; activations are warm, as right after the op that wrote them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from contenders import Contender, contenders
from harness import clocks, describe_environment, result_path, write_json
from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.engine.choices import choose_ops, resolve_device
from pi0_engine.engine.plan import GPU_PROMPT_BUCKET, ShapePlan
from pi0_engine.kernels.registry import all_ops
from pi0_engine.kernels.stream import Scratch
from pi0_engine.measuring.benchmark import measure_ceilings
from pi0_engine.measuring.op_calls import Arguments, OpCall, distinct, fill, record_op_calls, repeated, verify
from pi0_engine.measuring.timing import as_one, l2_bytes, run_seconds
from tables import kernels_table

#: Calls in one captured graph at least: enough that its start does not count.
_CALLS = 16
#: Measured replays of that graph.
_REPLAYS = 15
#: These wait for other programs of the same launch, so that a mistake may hang: last, when all else is reported.
_LAST = ("rmsnorm_mlp_residual",)


@dataclass
class Bench:
    """What all problems of one run share."""

    config: Pi0Config
    dtype: torch.dtype
    device: torch.device
    views: tuple[int, ...]
    prompt_tokens: int

    def __post_init__(self) -> None:
        self.ops = choose_ops(EngineConfig(device=str(self.device)), self.device)
        self.scratch = Scratch.allocate(self.device, needed=self.ops.launcher is not None)
        self.ceilings: dict[str, float] = {}

    def problems(self) -> dict[str, tuple[OpCall, int]]:
        """Of all view counts, each once by its label, with how often it is called; those that may hang last."""
        found: dict[str, tuple[OpCall, int]] = {}
        for views in self.views:
            bucket = GPU_PROMPT_BUCKET if self.device.type == "cuda" else 1
            plan = ShapePlan.of(self.config, views=[views], prompt_lengths=[self.prompt_tokens], prompt_bucket=bucket)
            for call, count in distinct(
                record_op_calls(self.config, plan, self.dtype, prompt_tokens=self.prompt_tokens)
            ):
                found.setdefault(call.label, (call, count))
        return dict(sorted(found.items(), key=lambda item: item[1][0].op in _LAST))

    def fill(self, call: OpCall) -> Arguments:
        return fill(call, self.device, self.scratch)

    def contenders(self, call: OpCall) -> list[Contender]:
        return contenders(call, self.device, self.ops.launcher)

    def floor_seconds(self, call: OpCall) -> float:
        self.ceilings = self.ceilings or measure_ceilings(self.dtype, self.device)
        cost = call.call.cost
        return max(cost.flops / self.ceilings["flops_per_s"], cost.bytes / self.ceilings["bytes_per_s"])

    def measure(self, call: OpCall, count: int) -> dict[str, Any]:
        """Verify every contender, then time it; a failing one says why and the next still runs."""
        row: dict[str, Any] = {
            "op": call.label,
            "stage": call.call.stage,
            "calls": count,
            "flops": call.call.cost.flops,
            "bytes": call.call.cost.bytes,
            "floor_us": 1e6 * self.floor_seconds(call),
            "implementations": {},
        }
        arguments = self.fill(call)
        for contender in self.contenders(call):
            try:
                row["implementations"][contender.name] = self._time(call, contender, arguments)
            except Exception as error:
                row["implementations"][contender.name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        return row

    def _time(self, call: OpCall, contender: Contender, arguments: Arguments) -> dict[str, float]:
        out = {"rel_l2": verify(call, contender.function, arguments)} if contender.whole else {}
        return {**out, "us": Timing(contender, arguments, self.device).microseconds()}

    def check(self, call: OpCall) -> float:
        """Our implementation verified once, nothing timed."""
        return verify(call, self.contenders(call)[0].function, self.fill(call))


class Timing:
    """Cold calls of an implementation: on a GPU a captured graph of them, else one call after the other.

    Attributes:
        calls: in one :meth:`run`.
    """

    def __init__(self, contender: Contender, arguments: Arguments, device: torch.device) -> None:
        calls = repeated(contender.function, arguments, _CALLS, l2_bytes(device))
        self.calls, self._device, self._run = len(calls), device, as_one(calls, device)

    def run(self) -> None:
        """All calls, and wait for them."""
        self._run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def microseconds(self) -> float:
        """Per call: the median over replays, by the GPU's events."""
        return 1e6 * statistics.median(run_seconds(self._run, self._device, _REPLAYS, warmup=3)) / self.calls


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = bench_of(request.config)
    if made.device.type != "cuda" and request.config.getoption("--kernels-device") != "cpu":
        pytest.skip("kernels are timed on a CUDA GPU, and torch sees none here")
    yield made


def bench_of(config: pytest.Config) -> Bench:
    """As the options of conftest.py say; without a GPU on a CPU, whose benchmarks are skipped."""
    wanted = config.getoption("--kernels-device")
    device = torch.device(wanted if wanted == "cpu" or torch.cuda.is_available() else "cpu")
    model = Pi0Config.load(config.getoption("--kernels-config"))
    views = tuple(int(word) for word in config.getoption("--kernels-views").split(","))
    return Bench(model, getattr(torch, config.getoption("--kernels-dtype")), device, views, 20)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = bench_of(metafunc.config).problems()
    on_cpu = metafunc.config.getoption("--kernels-device") == "cpu"
    pairs = [
        (label, name)
        for label, (call, _) in found.items()
        for name in (["torch"] if on_cpu else [*all_ops()[call.op].implementations, "torch", "library"])
    ]
    metafunc.parametrize(("label", "implementation"), pairs, ids=[f"{label}-{name}" for label, name in pairs])


def test_op(benchmark: Any, bench: Bench, label: str, implementation: str) -> None:
    call, _ = bench.problems()[label]
    found = {contender.name: contender for contender in bench.contenders(call)}
    if implementation not in found:
        pytest.skip(f"{implementation} cannot run {call.op} here")
    arguments, contender = bench.fill(call), found[implementation]
    benchmark.group = label
    if contender.whole:
        benchmark.extra_info["rel_l2"] = verify(call, contender.function, arguments)
    floor, cost, timing = bench.floor_seconds(call), call.call.cost, Timing(contender, arguments, bench.device)
    benchmark.extra_info.update(calls=timing.calls, flops=cost.flops, bytes=cost.bytes, floor_ms=1e3 * floor)
    if bench.device.type == "cuda":
        us = timing.microseconds()
        benchmark.extra_info.update(us_per_call=us, percent_of_floor=1e8 * floor / us)
        if implementation != "torch":
            baseline = Timing(found["torch"], arguments, bench.device).microseconds()
            benchmark.extra_info["torch_over_this"] = baseline / us
    benchmark.pedantic(timing.run, rounds=_REPLAYS, warmup_rounds=1)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pi0", help="'pi0', 'pi05' or a JSON file of sizes")
    parser.add_argument("--views", type=int, nargs="+", default=[2])
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", default=[""], help="ops whose name and sizes contain one of these")
    parser.add_argument("--check", action="store_true", help="run and verify our implementation once, time nothing")
    parser.add_argument("--slice", default="0/1", metavar="I/N", help="every N-th problem from the I-th on")
    parser.add_argument("--output", type=Path, help="JSON file, or a folder for one; rewritten after every op")
    return parser.parse_args(words)


def main() -> int:
    arguments = parse()
    device = resolve_device(arguments.device)
    bench = Bench(
        Pi0Config.load(arguments.config),
        getattr(torch, arguments.dtype),
        device,
        tuple(arguments.views),
        arguments.prompt_tokens,
    )
    first, step = (int(word) for word in arguments.slice.split("/"))
    found = bench.problems()
    chosen = [found[label] for label in found if any(word in label for word in arguments.only)][first::step]
    return _check(bench, [call for call, _ in chosen]) if arguments.check else _measure(bench, chosen, arguments.output)


def _check(bench: Bench, chosen: list[OpCall]) -> int:
    failures: list[str] = []
    for number, call in enumerate(chosen):
        print(f"{call.label}: ", end="", flush=True)
        started = time.perf_counter()
        try:
            print(f"relative L2 {bench.check(call):.1e}, {time.perf_counter() - started:.1f} s", flush=True)
        except Exception as error:
            print(f"FAILED {type(error).__name__}: {str(error)[:2000]}", flush=True)
            failures.append(f"{call.label}: {type(error).__name__}: {str(error)[:150]}")
            if _is_lost(bench.device):
                failures += [f"{left.label}: not run" for left in chosen[number + 1 :]]
                break
    print("\n".join(failures))
    print(f"{len(chosen) - len(failures)} of {len(chosen)} ops right")
    return 1 if failures else 0


def _is_lost(device: torch.device) -> bool:
    """Whether an illegal access or the like has ended this process's use of the GPU."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False


def _measure(bench: Bench, chosen: list[tuple[OpCall, int]], output: Path | None) -> int:
    if bench.device.type != "cuda":
        raise ValueError("kernels are timed on a CUDA GPU; --check works without one")
    path = result_path(output, bench.device, bench.config.model_type, bench.dtype, "_kernels") if output else None
    report: dict[str, Any] = {
        "kind": "kernels",
        "environment": describe_environment(bench.device),
        "model": bench.config.model_type,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "views": list(bench.views),
        "prompt_tokens": bench.prompt_tokens,
        "clocks_before": clocks(),
        "ops": [],
    }
    for call, count in chosen:
        print(call.label, flush=True)  # before it runs: the last line tells which one hangs
        row = bench.measure(call, count)
        report["ops"].append(row)
        for name, entry in row["implementations"].items():
            if "error" in entry:
                print(f"  {name}: {entry['error']}", flush=True)
        report.update(ceilings=bench.ceilings, clocks_after=clocks())
        if path:
            write_json(path, report)
        if any("error" in entry for entry in row["implementations"].values()) and _is_lost(bench.device):
            print("the GPU is lost to this process: the ops that follow are not timed")
            break
    print(kernels_table(report))
    errors = sum("error" in entry for row in report["ops"] for entry in row["implementations"].values())
    print(f"{len(report['ops'])} of {len(chosen)} ops timed, {errors} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

"""``pi0-engine kernels``: compile every kernel of the real models for GPUs that need not be there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pi0_engine.commands.options import print_json, show_progress, table
from pi0_engine.config import Pi0Config

if TYPE_CHECKING:
    from pi0_engine.kernels.gpu.cross_compile import Outcome
    from pi0_engine.kernels.gpu.launch import Launch
    from pi0_engine.kernels.gpu.target import Target

#: The inferences that are compiled: so many present cameras, an instruction of so many tokens.
VIEWS = (1, 2, 3)
PROMPT_TOKENS = 20


@dataclass(frozen=True)
class Kernels:
    """Compile every kernel instance of the models for each target, without a GPU.

    Prints registers, spilled bytes, shared memory against the target's limit, and seconds; instances that Triton
    finds in its cache are not compiled again. Fails if a kernel spills, needs more than the target has, or does not
    compile. Example:

        pi0-engine kernels --target sm_87,sm_120 --op linear
    """

    target: str = ""
    """Comma separated, as in sm_87,sm_90; all that the installed Triton can compile for where not given."""
    config: tuple[str, ...] = ("pi0", "pi05")
    """Models: 'pi0', 'pi05' or JSON files of sizes."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations."""
    op: str | None = None
    """Only the kernels of this op."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> int:
        from pi0_engine.kernels.gpu.cross_compile import compile_all, triton_version
        from pi0_engine.kernels.registry import all_ops

        version = triton_version()
        targets, left_out = self._targets()
        rows = [row for target in targets for row in self._instances(target)]
        if not rows:
            raise ValueError(f"op is {self.op!r}, expected one of {sorted(all_ops())}")
        jobs = [(row.launch, row.target) for row in rows]
        for number, outcome in compile_all(jobs, processes=os.cpu_count() or 1, progress=show_progress(self.json)):
            rows[number].outcome = outcome
        problems = [str(row) for row in rows if row.result.problem]
        if self.json:
            by_target = {f"sm_{t.arch}": [row.to_dict() for row in rows if row.target == t] for t in targets}
            print_json({"triton": version, "left_out": left_out, "targets": by_target, "problems": problems})
            return bool(problems)
        for target in targets:
            print(_text(target, [row for row in rows if row.target == target]), end="\n\n")
        for name, reason in left_out.items():
            print(f"{name} is left out: {reason}")
        for problem in problems:
            print(problem)
        verdict = f"FAILED: {len(problems)} of" if problems else "PASSED: no spill, no overflow in"
        print(f"{verdict} {len(rows)} kernels for {len(targets)} targets, Triton {version}")
        return bool(problems)

    def _targets(self) -> tuple[list[Target], dict[str, str]]:
        """The targets to compile for, and why others are left out. One that was asked for by name is not."""
        from pi0_engine.kernels.gpu.cross_compile import why_not
        from pi0_engine.kernels.gpu.target import TARGETS, parse_target

        names = dict.fromkeys(name.strip() for name in self.target.split(",")) if self.target else ()
        named = [parse_target(name) for name in names]
        refused = {f"sm_{target.arch}": why for target in named or TARGETS.values() if (why := why_not(target))}
        if named and refused:
            raise ValueError("; ".join(f"{name}: {why}" for name, why in refused.items()))
        return [target for target in named or TARGETS.values() if f"sm_{target.arch}" not in refused], refused

    def _instances(self, target: Target) -> list[_Row]:
        """Every distinct instance that the models' inferences launch, in the order of the first launch."""
        from pi0_engine.kernels.gpu.cross_compile import instance_key

        rows: dict[str, _Row] = {}
        for where, launch in self._launches(target):
            row = rows.setdefault(instance_key(launch, target), _Row(target, launch, {}))
            row.launches[where] = row.launches.get(where, 0) + 1
        return list(rows.values())

    def _launches(self, target: Target) -> Iterator[tuple[str, Launch]]:
        import torch

        from pi0_engine.engine import trace
        from pi0_engine.engine.plan import GPU_PROMPT_BUCKET, ShapePlan

        for name in self.config:
            config = Pi0Config.load(name)
            prompt = min(PROMPT_TOKENS, config.token_capacity)
            plans = {
                f"{name} with {views} view{'s'[: views > 1]}": ShapePlan.of(
                    config, views=[views], prompt_lengths=[prompt], prompt_bucket=GPU_PROMPT_BUCKET
                )
                for views in VIEWS
            }
            if config.is_pi05:
                (where, plan), *_ = plans.items()
                plans[f"{where} and a given prefix"] = dataclasses.replace(plan, per_token_time=True)
            (where, plan), *_ = plans.items()
            plans[f"{where} and a solver of second order"] = dataclasses.replace(plan, solver="midpoint")
            for where, plan in plans.items():
                for launch in trace.record_launches(config, plan, getattr(torch, self.dtype), target):
                    if self.op in (None, launch.op):
                        yield where, launch


@dataclass
class _Row:
    """A kernel instance: its first launch, and how often each inference launches it."""

    target: Target
    launch: Launch
    launches: dict[str, int]
    outcome: Outcome | None = None

    @property
    def result(self) -> Outcome:
        assert self.outcome is not None, "not compiled yet"
        return self.outcome

    def __str__(self) -> str:
        """The problem, and where it is: target, op, shape, configuration, inference."""
        where = next(iter(self.launches))
        return f"sm_{self.target.arch} {self.launch.op}: {describe(self.launch)} in {where} {self.result.problem}"

    def to_dict(self) -> dict[str, Any]:
        compiled = self.result.compiled
        return {
            "op": self.launch.op,
            "instance": describe(self.launch),
            "grid": list(self.launch.grid),
            "launches": self.launches,
            "registers": compiled.registers if compiled else None,
            "spill_bytes": compiled.spill_bytes if compiled else None,
            "stack_bytes": compiled.stack_bytes if compiled else None,
            "shared_bytes": compiled.shared_bytes if compiled else None,
            "shared_limit_bytes": self.target.shared_bytes,
            "seconds": compiled.seconds if compiled else None,
            "problem": self.result.problem,
            "specialization": compiled.key if compiled else None,
        }


def describe(launch: Launch) -> str:
    """The kernel with its lengths and constants (none that are off), and how it is compiled."""
    shown = []
    for name, value in launch.arguments.items():
        if isinstance(value, bool):
            shown += [name] if value else []
        elif isinstance(value, int | str) and value:
            shown.append(f"{name}={value}")
    options = f"{launch.num_warps} warps, {launch.num_stages} stages{', pdl' if launch.pdl else ''}"
    return f"{launch.kernel.__name__}({', '.join(shown)}; {options})"


def _text(target: Target, rows: list[_Row]) -> str:
    instances = [describe(row.launch) for row in rows]
    width = max(map(len, instances))
    cells = []
    for row, instance in zip(rows, instances, strict=True):
        numbers = ["-"] * 4
        if compiled := row.result.compiled:
            shared = f"{compiled.shared_bytes / 1024:.1f}"
            seconds = "cached" if compiled.seconds is None else f"{compiled.seconds:.2f}"
            numbers = [str(compiled.registers), str(compiled.spill_bytes), shared, seconds]
        grid = " x ".join(map(str, row.launch.grid))
        cells.append([row.launch.op, *numbers, grid, instance.ljust(width)])
    limit = f"{target.shared_bytes // 1024} KiB of shared memory per block"
    header = ["op", "registers", "spill bytes", "shared KiB", "seconds", "grid", "instance".ljust(width)]
    fresh = [row.result.compiled.seconds for row in rows if row.result.compiled and row.result.compiled.seconds]
    return "\n".join(
        [
            f"sm_{target.arch} ({target.name}): {limit}",
            table(header, cells),
            f"{len(rows)} kernels, {len(fresh)} compiled anew in {sum(fresh):.1f} s of processor time",
        ]
    )

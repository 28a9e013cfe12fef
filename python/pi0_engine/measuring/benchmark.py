"""Measure the engine on random weights: verify against the reference first, then time, then say how far the floor is.

The floor of a stage is max(FLOP / rate, bytes / bandwidth), with the rates measured on the same machine in the same
run. Ratios against the reference are of the same run as well; absolute times on a shared machine are not comparable.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import CAMERA_SLOTS, EngineConfig, Pi0Config, SolverName
from pi0_engine.engine.choices import resolve_device, resolve_dtype
from pi0_engine.engine.machine import describe_machine
from pi0_engine.engine.runtime import Engine
from pi0_engine.engine.trace import count_work, work_per_stage
from pi0_engine.inputs import ModelInputs
from pi0_engine.kernels.gemm import arithmetic_dtype, never_widened
from pi0_engine.measuring.cases import Difference, sample_reference
from pi0_engine.measuring.timing import run_seconds
from pi0_engine.reference.model import Pi0Reference

#: Engine against reference before anything is timed, relative L2: exact algebra in float32; in bfloat16 two
#: independent roundings, each up to 0.01 from float32 (docs/parity.md). The reference knows no other dtype.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.03}

#: The plain PyTorch reference; or this engine in bfloat16, multiplied by the processor's own instructions even where
#: widening to float32 is faster (kernels/gemm.py).
Baseline = Literal["reference", "unwidened"]


@dataclass(frozen=True)
class Workload:
    """One inference to measure.

    Attributes:
        views: cameras present; the reference computes all slots (three or more) and masks the rest.
        prompt_tokens: valid tokens; the reference pads them to the model's capacity.
        samples: candidate chunks from one prefix.
    """

    config: Pi0Config
    views: int
    prompt_tokens: int
    horizon: int
    num_steps: int
    seed: int
    samples: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.views <= 4:
            raise ValueError(f"views is {self.views}, expected 1 to 4")
        if not 1 <= self.prompt_tokens <= self.config.token_capacity:
            raise ValueError(f"prompt tokens are {self.prompt_tokens}, expected 1 to {self.config.token_capacity}")

    @property
    def slots(self) -> int:
        """Camera slots, present or not."""
        return max(self.views, len(CAMERA_SLOTS))

    @property
    def reference_prefix(self) -> int:
        """Prefix tokens that the reference computes: of all camera slots, and of the padded prompt."""
        return self.slots * self.config.vision.num_patches + self.config.token_capacity

    def inputs(self) -> tuple[ModelInputs, Tensor]:
        """Random images, tokens and state, and noise float32 [1, samples, H, action_dim]."""
        generator = torch.Generator().manual_seed(self.seed)
        config, slots = self.config, self.slots
        size, length = config.vision.image_size, config.token_capacity
        assert config.llm.vocab_size is not None
        tokens = torch.randint(0, config.llm.vocab_size, (1, length), generator=generator)
        inputs = ModelInputs(
            images=(torch.rand(1, slots, size, size, 3, generator=generator) * 2 - 1).numpy(),
            image_masks=(np.arange(slots) < self.views)[None],
            tokens=tokens.numpy(),
            token_mask=(np.arange(length) < self.prompt_tokens)[None],
            state=torch.randn(1, config.action_dim, generator=generator).numpy(),
        )
        return inputs, torch.randn(1, self.samples, self.horizon, config.action_dim, generator=generator)


def run_benchmark(
    work: Workload, engine_config: EngineConfig, *, runs: int, baseline: Baseline | None, progress: bool
) -> dict[str, Any]:
    """Everything ``pi0-engine bench`` prints, as JSON-ready data. Times in milliseconds, memory in bytes.

    Raises:
        ValueError: engine and baseline disagree (the baseline is not timed then), or a setting cannot be used.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}, expected at least 1")
    device = resolve_device(engine_config.device)
    if baseline == "unwidened" and device.type != "cpu":
        raise ValueError(f"the baseline 'unwidened' is of a CPU: a GPU never widens bfloat16, and device is {device}")
    dtype, _ = resolve_dtype(engine_config.dtype, device)
    if baseline == "reference" and dtype not in AGREEMENT:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"the reference runs in float32 or bfloat16, not in {name}: there is no baseline for it")
    # Stored in the dtype that runs, as deployed checkpoints are: the embedding table is not twice as big then.
    engine = Engine(RandomCheckpoint(work.config, work.seed, dtype), engine_config, progress=progress)
    inputs, noise = work.inputs()
    actions = engine.infer(inputs, noise, num_steps=work.num_steps).actions[0]  # the warm-up as well
    measured: list[dict[str, float]] = []
    for _ in tqdm(range(runs), "engine", disable=not progress, leave=False):
        started = time.perf_counter()
        stages = engine.infer(inputs, noise, num_steps=work.num_steps).seconds
        measured.append({**stages, "total": time.perf_counter() - started})
    peak = peak_memory(engine.device)  # before the ceilings, which need half a gigabyte of their own
    ceilings = measure_ceilings(engine.dtype, engine.device)
    report: dict[str, Any] = {
        "machine": describe_machine(engine.device),
        "workload": {
            "model": work.config.model_type,
            "views": work.views,
            "prompt_tokens": work.prompt_tokens,
            "horizon": work.horizon,
            "num_steps": work.num_steps,
            "solver": engine_config.solver,
            "seed": work.seed,
        },
        "dtype": str(engine.dtype).removeprefix("torch."),
        "runs": runs,
        "ceilings": ceilings,
        "engine": _against_floor(work, engine, measured, ceilings),
        "packed_weight_bytes": engine.weights.packed_bytes,
        "peak_memory_bytes": peak,
    }
    del engine  # the baseline needs as much memory again
    gc.collect()
    if baseline:
        if baseline == "reference":
            sample, agreement = _reference(work, engine_config.solver, device, dtype), AGREEMENT[dtype]
        else:
            sample, agreement = _unwidened(work, engine_config), AGREEMENT[torch.bfloat16]
        report["baseline"] = {
            "name": baseline,
            **_measure_baseline(baseline, sample, agreement, actions, runs, progress),
        }
        if baseline == "reference":
            report["baseline"]["prefix_tokens"] = work.reference_prefix
        report["speedup"] = report["baseline"]["p50_ms"] / report["engine"]["total"]["p50_ms"]
    return report


def _against_floor(
    work: Workload, engine: Engine, measured: list[dict[str, float]], ceilings: dict[str, float]
) -> dict[str, dict[str, float]]:
    """p50 and p99 of each stage and the whole, with work, floor and percent of the floor where there is work."""
    plan = engine.plan(
        views=[work.views], prompt_lengths=[work.prompt_tokens], horizon=work.horizon, num_steps=work.num_steps
    )
    costs = work_per_stage(count_work(work.config, plan, engine.dtype))
    floors = {
        stage: max(cost.flops / ceilings["flops_per_s"], cost.bytes / ceilings["bytes_per_s"])
        for stage, cost in costs.items()
    }
    out: dict[str, dict[str, float]] = {}
    for stage in measured[0]:
        times = [m[stage] for m in measured]
        row = {"p50_ms": 1e3 * float(np.median(times)), "p99_ms": 1e3 * float(np.quantile(times, 0.99))}
        if stage in costs:
            row.update(flops=costs[stage].flops, bytes=costs[stage].bytes, floor_ms=1e3 * floors[stage])
        elif stage in ("replay", "total"):
            row["floor_ms"] = 1e3 * sum(floors.values())
        if "floor_ms" in row:
            row["percent_of_floor"] = 100 * row["floor_ms"] / row["p50_ms"]
        out[stage] = row
    return out


def _reference(work: Workload, solver: SolverName, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What runs the reference once -> [samples, H, A]."""
    checkpoint = RandomCheckpoint(work.config, work.seed, dtype)
    model = Pi0Reference.from_tensors(work.config, checkpoint.tensor, dtype).to(device)
    inputs, noise = work.inputs()
    return lambda: sample_reference(model, inputs, noise[0], work.num_steps, solver)


def _unwidened(work: Workload, engine_config: EngineConfig) -> Callable[[], Tensor]:
    """What runs the engine once in bfloat16 as it is -> [samples, H, A]."""
    checkpoint = RandomCheckpoint(work.config, work.seed, torch.bfloat16)
    engine = Engine(checkpoint, dataclasses.replace(engine_config, dtype="bfloat16"))
    inputs, noise = work.inputs()

    def sample() -> Tensor:
        with never_widened():
            return engine.infer(inputs, noise, num_steps=work.num_steps).actions[0]

    return sample


def _measure_baseline(
    name: Baseline,
    sample: Callable[[], Tensor],
    agreement: float,
    engine_actions: Tensor,
    runs: int,
    progress: bool,
) -> dict[str, float]:
    difference = Difference.between(engine_actions, sample())  # the warm-up as well
    if not difference.rel_l2 <= agreement:
        raise ValueError(
            f"engine and {name} disagree: relative L2 {difference.rel_l2:.2e}, expected <= {agreement:.0e}"
        )
    times = []
    for _ in tqdm(range(runs), name, disable=not progress, leave=False):
        started = time.perf_counter()
        sample()
        times.append(time.perf_counter() - started)
    return {
        "p50_ms": 1e3 * float(np.median(times)),
        "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
        "rel_l2": difference.rel_l2,
    }


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What this machine does at best: FLOP/s of a large matrix product, bytes/s of a large copy (read and write).

    Of random numbers: products of zeros or ones take less power, so that a GPU runs them faster. The fastest of some
    runs counts, which makes floors lower, never higher.
    """
    repeats, warmup = (20, 3) if device.type == "cuda" else (5, 1)
    rows, n, elements = _ceiling_sizes(dtype, device)
    a = torch.randn(rows, n, device=device).to(dtype)
    a = a.to(arithmetic_dtype(a))
    b = torch.randn(n, n, device=device).to(a.dtype)
    product = a.new_empty(rows, n)
    big = torch.randn(elements, device=device)
    other = torch.empty_like(big)
    with torch.inference_mode():
        gemm_s = min(run_seconds(lambda: torch.matmul(a, b, out=product), device, repeats, warmup=warmup))
        copy_s = min(run_seconds(lambda: other.copy_(big), device, repeats, warmup=warmup))
    return {"flops_per_s": 2 * rows * n * n / gemm_s, "bytes_per_s": 2 * big.numel() * 4 / copy_s}


def _ceiling_sizes(dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """Rows and width of the product, elements of the copy: on a GPU large, but of its free memory an eighth each."""
    if device.type != "cuda":
        return 1024, 4096, 64 << 20
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it for later use
    n = 8192 if dtype.itemsize == 2 else 4096
    while n > 1024 and 4 * n * n * 4 > free // 8:  # float32 random numbers, and three matrices
        n //= 2
    return n, n, min(512 << 20, free // 64)


def peak_memory(device: torch.device) -> int:
    """Highest memory so far, in bytes: of the GPU's allocator, or of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # Linux counts kilobytes

"""Shared by the benchmarks: weights drawn on all cores, quantiles, files of results, what was measured on what."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import Pi0Config
from pi0_engine.measuring import benchmark
from pi0_engine.measuring.timing import l2_bytes

RESULTS = Path(__file__).parent / "results"
#: Where the files are that a commit is asked for.
_ROOT = Path(__file__).parent.parent
#: nvidia-smi's names -> ours, with the unit.
_CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "mem_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


class DrawnWeights:
    """A :class:`RandomCheckpoint` whose tensors were all drawn at once on all cores, and stay in host memory.

    Engine and reference then load from memory, as they would from a checkpoint that the system has cached.
    """

    def __init__(self, config: Pi0Config, seed: int, dtype: torch.dtype) -> None:
        self.config = config
        source = RandomCheckpoint(config, seed, dtype)
        largest_first = sorted(source.shapes, key=lambda name: -math.prod(source.shapes[name]))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            drawn = pool.map(source.tensor, largest_first)
            self._tensors = dict(zip(largest_first, drawn, strict=True))

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and how many."""
    p50, p99 = (float(np.quantile(milliseconds, q)) for q in (0.5, 0.99))
    return {"p50_ms": p50, "p99_ms": p99, "runs": len(milliseconds)}


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    out: dict[str, Any] = {
        **benchmark.describe_machine(device),
        "triton": _version("triton"),
        "flash_attn": _version("flash-attn"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        out.update(
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            memory_bytes=found.total_memory,
            l2_bytes=l2_bytes(device),
            cuda=torch.version.cuda,
            driver=_ask_smi(["driver_version"]).get("driver_version", "unknown"),
        )
    return out


def clocks() -> dict[str, float]:
    """The GPU's clocks, power and temperature now, as nvidia-smi tells them; what it does not tell is left out."""
    out = {}
    for name, value in _ask_smi(list(_CLOCKS)).items():
        with contextlib.suppress(ValueError):
            out[_CLOCKS[name]] = float(value)
    return out


def commit() -> str:
    """The commit of this checkout, with "+" behind it where files differ; PI0_ENGINE_COMMIT where there is no git."""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PI0_ENGINE_COMMIT", "unknown")
    return head + ("+" if changed else "")


def result_path(wanted: Path | None, device: torch.device, model: str, dtype: torch.dtype, suffix: str = "") -> Path:
    """``wanted``, if it is a file's; else ``<device>_<model>_<dtype>.json`` in that folder, or in ``results/``.

    "NVIDIA H200" with full-size π0 in bfloat16 is ``h200_pi0_bfloat16.json``.
    """
    if wanted is not None and wanted.suffix == ".json":
        return wanted
    name = str(benchmark.describe_machine(device)["device"]).lower()
    words = [word for word in re.findall(r"[a-z0-9]+", name) if word not in ("nvidia", "geforce", "r", "tm", "cpu")]
    return (wanted or RESULTS) / f"{'-'.join(words)}_{model}_{str(dtype).removeprefix('torch.')}{suffix}.json"


def write_json(path: Path, data: Any) -> None:
    """At once: a reader, or the next part after this one was cut off, never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


def _ask_smi(names: list[str]) -> dict[str, str]:
    """nvidia-smi about the first GPU (of CUDA_VISIBLE_DEVICES, if it names one); nothing where it is not there."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    command = ["nvidia-smi", f"--id={first}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""What an engine runs on, for people who read its numbers."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from pi0_engine.kernels.availability import unsafe_triton
from pi0_engine.kernels.gpu.target import target_of


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on; ``unsafe`` says why some of them may be wrong."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    unsafe = unsafe_triton(target_of(device).arch) if device.type == "cuda" else None
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **({"unsafe": unsafe} if unsafe else {}),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""What an engine decides once, when it is built: its device, its dtype, and which implementation of each op runs."""

from __future__ import annotations

from pathlib import Path

import torch

from pi0_engine.config import EngineConfig
from pi0_engine.kernels.availability import unsafe_triton
from pi0_engine.kernels.gemm import cpu_products
from pi0_engine.kernels.gpu.configs import LaunchConfigs
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.gpu.target import target_of
from pi0_engine.kernels.ranges import with_ranges
from pi0_engine.kernels.registry import Ops, select_ops


def resolve_device(name: str) -> torch.device:
    """The torch device of that name, or ValueError with the reason why it cannot be used."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one torch knows: {error}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device is {name!r}, expected 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} sees no CUDA GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA GPU(s), numbered from 0")
    return device


def resolve_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and activations, and why."""
    if name != "auto":
        if device.type == "cpu" and name == "bfloat16":
            cpu_products()  # timed now, not in the first inference
        return getattr(torch, name), "asked for by name"
    if device.type == "cuda":
        return torch.bfloat16, "the GPU's tensor cores take bfloat16"
    products = cpu_products()
    if products.best_dtype == torch.float32:
        return torch.float32, f"products of float32 are clearly faster here: {products}"
    return torch.bfloat16, f"half of float32's memory, and products are not clearly slower here: {products}"


def choose_ops(config: EngineConfig, device: torch.device) -> Ops:
    """The ops as the configuration asks for them.

    Raises:
        ValueError: an implementation that is not available, or launch configurations that cannot be read.
    """
    launcher = None
    if config.launch_configs is not None:
        configs = LaunchConfigs.load(Path(config.launch_configs))
        launcher = Launcher(target_of(device), configs, concurrent=device.type != "cpu")
    prefer = (
        {} if config.attention == "auto" else dict.fromkeys(("vision_attention", "prefix_attention"), config.attention)
    )
    ops = select_ops(config.backend, device, launcher, prefer)
    return with_ranges(ops) if config.nvtx else ops


def why_unsafe(ops: Ops, device: torch.device) -> str | None:
    """Why what was chosen may compute wrong numbers on this GPU (docs/gpu.md); None if nothing is known."""
    if device.type != "cuda" or all(choice.implementation != "triton" for choice in ops.choices):
        return None
    return unsafe_triton(target_of(device).arch)

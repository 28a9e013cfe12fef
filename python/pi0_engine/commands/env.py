"""``pi0-engine env``: what would run here, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pi0_engine.commands.options import Backend, Dtype, print_json
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.torch_needed import why_no_torch

if TYPE_CHECKING:
    import torch

    from pi0_engine.kernels.gpu.launch import Launcher

_OPTIONAL = {
    "triton": "gpu",
    "cuda-python": "gpu",
    "nvtx": "gpu",
    "flash-attn": "flash-attn",
    "tensorstore": "jax",
    "websockets": "serve",
    "matplotlib": "plot",
}


@dataclass(frozen=True)
class Env:
    """Show versions, devices, and which implementation of every part would run here, with the reason."""

    device: Literal["cpu", "cuda"] = "cpu"
    """The device to answer for."""
    dtype: Dtype = "auto"
    backend: Backend = "auto"
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> int:
        report = self._report()
        if self.json:
            print_json(report)
            return 0
        for section, entries in report.items():
            print(section)
            width = max(len(name) for name in entries)
            for name, value in entries.items():
                print(f"  {name.ljust(width)}  {value}")
        return 0

    def _report(self) -> dict[str, dict[str, Any]]:
        frames = FramePreprocessor()
        running: dict[str, dict[str, Any]] = {}
        torch_version = why_no_torch()
        if torch_version is not None:
            threads, gpus = os.cpu_count(), "unknown: torch would see them"
            running["engine"] = {"device": f"none: an engine needs torch, which is {torch_version}"}
        else:
            import torch

            torch_version, threads = torch.__version__, torch.get_num_threads()
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            gpus = ", ".join(names) or f"none that torch {torch.__version__} sees"
            running = self._running()
        running["engine"]["frames"] = f"{frames.implementation}: {frames.reason}"
        return {
            "versions": {
                "pi0-engine": _version("pi0-engine"),
                "python": f"{platform.python_version()} ({sys.executable})",
                "torch": torch_version,
                "numpy": _version("numpy"),
            },
            "machine": {"system": platform.platform(), "threads": threads, "GPUs": gpus},
            **running,
            "optional packages": {
                name: _version(name) or f"not installed (pip install 'pi0-engine[{extra}]')"
                for name, extra in _OPTIONAL.items()
            },
        }

    def _running(self) -> dict[str, dict[str, Any]]:
        """What an engine would do here."""
        from pi0_engine.engine.choices import resolve_device, resolve_dtype, why_unsafe
        from pi0_engine.kernels.availability import unsafe_triton
        from pi0_engine.kernels.registry import select_ops

        device = resolve_device(self.device)
        dtype, why = resolve_dtype(self.dtype, device)
        ops = select_ops(self.backend, device)
        unsafe = why_unsafe(ops, device) if device.type == "cuda" else unsafe_triton()
        return {
            "engine": {
                "device": str(device),
                "dtype": f"{str(dtype).removeprefix('torch.')}: {why}",
                "matrix products": _matrix_products(dtype, device),
                "launch configurations": _launch_configs(ops.launcher),
                **({"Triton": unsafe} if unsafe else {}),
            },
            "ops": {choice.op: f"{choice.implementation}: {choice.reason}" for choice in ops.choices},
        }


def _matrix_products(dtype: torch.dtype, device: torch.device) -> str:
    """In what bfloat16 is multiplied, and how fast a CPU multiplies it in which way."""
    import torch

    from pi0_engine.kernels.gemm import cpu_products

    if device.type != "cpu" or dtype != torch.bfloat16:
        return "in the dtype"
    products = cpu_products()
    how = "in the dtype" if products.native else "in float32, to which weights are widened on each call"
    return f"{how}: measured {products}"


def _launch_configs(launcher: Launcher | None) -> str:
    """For which GPU generation the tile sizes were made, which may be another than the one at hand."""
    if launcher is None:
        return "none needed: no kernel of ours runs here"
    from pi0_engine.kernels.gpu.configs import configs_for

    _, listed = configs_for(launcher.target.arch)
    found = f"of sm_{listed}"
    return found if listed == launcher.target.arch else f"{found}, the nearest to sm_{launcher.target.arch}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

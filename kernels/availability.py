"""Why an implementation cannot run on a device: one function per name, None where it can."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

#: Tensor cores that take bfloat16 came with this compute capability.
_OLDEST_ARCH = (8, 0)


def _not_on_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the device is {str(device)!r}"
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST_ARCH:
        return (
            f"it needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        )
    return None


def _triton(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'pi0-engine[gpu]')"
    if device.type == "meta":  # launches are recorded, not executed
        return None
    if device.type == "cpu":
        from triton import knobs

        interpreted = bool(knobs.runtime.interpret)
        return None if interpreted else "on a CPU it only runs in Triton's slow interpreter, with TRITON_INTERPRET=1"
    return _not_on_gpu(device)


def _flash_attn(device: torch.device) -> str | None:
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'pi0-engine[flash-attn]')"
    return _not_on_gpu(device)


UNAVAILABLE: dict[str, Callable[[torch.device], str | None]] = {"triton": _triton, "flash_attn": _flash_attn}

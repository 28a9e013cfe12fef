"""Why an implementation cannot run on a device: one function per name, None where it can."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch

#: Tensor cores that take bfloat16 came with this compute capability.
_OLDEST_ARCH = (8, 0)


#: The first Triton that fences every asynchronous copy into shared memory off from the wgmma or tcgen05 that reads it.
SAFE_TRITON = "3.7.1"
#: The first GPUs that multiply out of shared memory by themselves.
_NEEDS_FENCES = 90


def unsafe_triton(arch: int | None = None, version: str | None = None) -> str | None:
    """Why kernels of the installed Triton may compute wrong numbers on a GPU of generation ``arch``; None if not so.

    Triton 3.6 and 3.7.0 leave out ``fence.proxy.async`` between ``cp.async`` and ``wgmma``: the product may read
    what the copy has not written yet. Without ``arch`` the answer is for any GPU, without ``version`` for what is
    installed.
    """
    version = version or _triton_version()
    if version is None:
        return None
    if (arch is not None and arch < _NEEDS_FENCES) or _numbers(version) >= _numbers(SAFE_TRITON):
        return None
    where = "on sm_90 and newer" if arch is None else f"on sm_{arch}"
    return (
        f"Triton {version} is unsafe {where}: it leaves out a fence between asynchronous copies and the matrix "
        f"products that read them, so that results may be wrong; expected {SAFE_TRITON} or newer"
    )


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        if find_spec("triton") is None:
            return None
        import triton  # of a distribution with another name, as nightly builds have

        return str(triton.__version__)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


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


def extension() -> ModuleType:
    """``pi0_engine._C``. Raises an ImportError where it was not built."""
    import pi0_engine._C as compiled

    return compiled


def _cpp(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPUs, the device is {str(device)!r}"
    try:
        extension()
    except ImportError as error:
        return f"the extension pi0_engine._C cannot be imported ({error})"
    return None


def _cuda(device: torch.device) -> str | None:
    if device.type == "meta":  # only shapes are checked
        return None
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the device is {str(device)!r}"
    try:
        compiled = extension()
    except ImportError as error:
        return f"the extension pi0_engine._C cannot be imported ({error})"
    architectures: tuple[int, ...] = compiled.cuda_architectures()
    if not architectures:
        return "the extension pi0_engine._C was built without nvcc"
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code runs within its major version; PTX of the newest serves all that came later.
    runs = [number for number in architectures if number // 10 == major and number % 10 <= minor]
    if not runs and 10 * major + minor < architectures[-1]:
        known = ", ".join(f"{number // 10}.{number % 10}" for number in architectures)
        return f"pi0_engine._C holds code for compute capability {known}, {str(device)!r} has {major}.{minor}"
    with torch.cuda.device(device):
        return compiled.load_frames_to_patches_cuda() or None


UNAVAILABLE: dict[str, Callable[[torch.device], str | None]] = {
    "triton": _triton,
    "flash_attn": _flash_attn,
    "cuda": _cuda,
    "cpp": _cpp,
}

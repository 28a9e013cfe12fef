"""``frames_to_patches`` in C++ (csrc/frames_to_patches.cpp)."""

from __future__ import annotations

from torch import Tensor

from pi0_engine.kernels.availability import extension
from pi0_engine.kernels.frames import geometry


def frames_to_patches(launcher: object, pixels: Tensor, table: Tensor, *, patches: Tensor) -> None:
    """The CUDA kernel's code as loops on one core.

    Raises:
        ValueError: a table that leads outside the buffers, or other arguments than the op takes.
    """
    count, size, patch = geometry(pixels, table, patches)
    extension().frames_to_patches_host(pixels.numpy(), table.numpy(), patches.numpy(), count, size, patch)

"""``frames_to_patches`` in CUDA C++ (csrc/frames_to_patches.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from pi0_engine.kernels.availability import extension
from pi0_engine.kernels.frames import geometry


def frames_to_patches(launcher: object, pixels: Tensor, table: Tensor, *, patches: Tensor) -> None:
    """One launch on the current stream of the tensors' device. The table's contents are not checked."""
    count, size, patch = geometry(pixels, table, patches)
    if patches.is_meta:  # nothing to compute
        return
    with torch.cuda.device(patches.device):
        stream = torch.cuda.current_stream().cuda_stream
        extension().frames_to_patches_cuda(
            pixels.data_ptr(), table.data_ptr(), patches.data_ptr(), count, size, patch, stream
        )

"""Host-side arithmetic of the launches: tiles, parts, tensor descriptors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pi0_engine.kernels.gpu.configs import LaunchConfig
from pi0_engine.kernels.stream import Scratch, sum_blocks

#: What the tensor memory accelerator asks of addresses and row lengths, in bytes.
_TMA_ALIGNMENT = 16


def divide(length: int, block: int) -> int:
    """Blocks that cover the length."""
    return -(-length // block)


def power_of_two(length: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(length - 1, 0).bit_length()


def blocks(width: int) -> int:
    """Partial sums per row of a stream, rounded up to what a kernel can index."""
    return power_of_two(sum_blocks(width))


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly. TF32 has bfloat16's exponent but three digits only."""
    return "ieee" if dtype == torch.float32 else "tf32"


def splits_that_fit(config: LaunchConfig, tiles: int, tile_size: int, scratch: Scratch) -> int:
    """Parts per tile: as configured, or as many as the working memory holds (a large batch needs none)."""
    if config.splits == 1 or tiles > scratch.counters.numel():
        return 1
    return max(1, min(config.splits, scratch.partials.numel() // (tiles * tile_size)))


def describe(a: Tensor, w: Tensor, config: LaunchConfig, *, contiguous: bool = True) -> dict[str, Any]:
    """Kernel arguments ``a``, ``w``, ``TMA``.

    Descriptors of tiles where the configuration asks for them, rows are multiples of 16 bytes and the rows of a tile
    are ``contiguous``; else plain pointers.
    """
    row_bytes = a.shape[1] * a.element_size()
    if not (config.tma and contiguous and row_bytes % _TMA_ALIGNMENT == 0):
        return {"a": a, "w": w, "TMA": False}
    from triton.tools.tensor_descriptor import TensorDescriptor

    return {
        "a": TensorDescriptor.from_tensor(a, [config.block_m, config.block_k]),
        "w": TensorDescriptor.from_tensor(w, [config.block_n, config.block_k]),
        "TMA": True,
    }

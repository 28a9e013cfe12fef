"""Matrix products as torch runs them, shared by the meanings of the ops."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

#: Weights that are widened at a time: 16 MB in float32, which the allocator reuses and the caches partly hold. Whole
#: matrices are slower: 25 instead of 14 ms for 8192 x 1024 times 50 rows, 422 instead of 363 ms for 32768 x 2048
#: times 524 (two Cascade Lake cores).
_PIECE = 1 << 22


@cache
def cpu_computes_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot-product instructions (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return {"bf16"} if platform.machine() == "arm64" and platform.system() == "Darwin" else set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which to multiply ``tensor``: its own, except bfloat16 on a CPU that only emulates it.

    There oneDNN's bfloat16 product reaches a third of the float32 one (50 against 150 GFLOP/s on two Cascade Lake
    cores), so widening the weights on every call costs less than it saves.
    """
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not cpu_computes_bfloat16():
        return torch.float32
    return tensor.dtype


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]; accumulated in float32 -> [..., N].

    The result is in the arithmetic dtype, for the caller to round when it stores it.
    """
    dtype = arithmetic_dtype(weight)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if dtype == weight.dtype or weight.numel() <= _PIECE:
        return F.linear(x, weight.to(dtype), bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    pieces = -(-weight.numel() // _PIECE)
    for columns, rows in zip(out.tensor_split(pieces, dim=-1), weight.tensor_split(pieces), strict=True):
        columns.copy_(F.linear(x, rows.to(dtype)))
    return out if bias is None else out.add_(bias)

"""The prompt's rows of the prefix on the GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.gpu.operands import divide
from pi0_engine.kernels.gpu.tiles import write_stream
from pi0_engine.kernels.stream import Stream


@triton.jit
def prompt_kernel(
    prompt,  # float32 [at least rows, N]
    length,  # int32 [1], valid tokens of the observation
    out,
    out_rounded,
    out_square_sums,
    rows,
    start,  # tokens of the observation before these rows
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    valid = (row < rows) & (start + row < tl.load(length))
    x = tl.load(prompt + row[:, None] * N + column[None, :], mask=valid[:, None] & (column < N)[None, :], other=0.0)
    write_stream(out, out_rounded, out_square_sums, None, None, None, x, first_row, first_column, rows, N)


def embed_prompt(launcher: Launcher, prompt: Tensor, start: int, length: Tensor, *, out: Stream) -> None:
    rows, n = out.x.shape
    config = launcher.config("embed_prompt", rows=rows, n=n, k=0)
    arguments = {
        "prompt": prompt,
        "length": length,
        "out": out.x,
        "out_rounded": out.rounded,
        "out_square_sums": out.square_sums,
        "rows": rows,
        "start": start,
        "N": n,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": config.pdl,
    }
    grid = (divide(rows, config.block_m), divide(n, config.block_n))
    launcher(Launch("embed_prompt", prompt_kernel, grid, arguments, config.warps, config.stages, config.pdl))

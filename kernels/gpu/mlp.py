"""A whole MLP in one launch, for few rows: geglu, a barrier across all programs, down projection and residual.

By count, a layer of the flow loop reads 34.6 MB of weights: 8 us at an H200's 4.3 TB/s for all its kernels, so that
every end of one kernel and beginning of the next shows. All programs run at once (one per multiprocessor at most), so
they can wait for each other instead, and ask L2 for their share of the down projection meanwhile. The interpreter runs
programs one after another, where waiting would never end: there the two halves are two launches of the same kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.gpu.operands import blocks, describe, divide, precision, splits_that_fit
from pi0_engine.kernels.gpu.tiles import (
    RMS_NORM,
    gelu,
    is_last,
    of_rows,
    part_of,
    prefetch_rows,
    product_pair,
    product_tile,
    row_factor,
    store_part,
    sum_parts,
    wait_for_all,
    write_stream,
)
from pi0_engine.kernels.stream import Scratch, Stream

#: Which halves a launch runs.
BOTH, UP, DOWN = (tl.constexpr(i) for i in range(3))


@triton.jit
def mlp_kernel(
    a,  # [rows, K], the rounded part of the stream, or a tensor descriptor of it
    gate_up,  # [2 * HIDDEN, K], or a tensor descriptor of it
    gate_up_ptr,
    bias,  # float32 [2 * HIDDEN] or None; it, gate and next_scale are tables of two for time_index
    hidden_in,  # [rows, HIDDEN], or a tensor descriptor of it
    hidden,
    down,  # [K, HIDDEN], or a tensor descriptor of it
    down_ptr,
    gate,  # float32 [K] or None
    next_scale,
    time_index,  # int32 [rows] or None
    x,
    rounded,
    square_sums,  # of the stream
    partials,
    counters,
    barrier,
    rows,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    NORM_BLOCKS: tl.constexpr,
    HALVES: tl.constexpr,
    UP_M: tl.constexpr,
    UP_N: tl.constexpr,
    UP_K: tl.constexpr,
    UP_TMA: tl.constexpr,
    DOWN_M: tl.constexpr,
    DOWN_N: tl.constexpr,
    DOWN_K: tl.constexpr,
    DOWN_TMA: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_tiles = tl.cdiv(rows, UP_M)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        first_pair = (program // row_tiles) * UP_N
        prefetch_rows(gate_up_ptr, first_pair, HIDDEN, 0, K, K, UP_N)
        prefetch_rows(gate_up_ptr + HIDDEN * K, first_pair, HIDDEN, 0, K, K, UP_N)
        tl.extra.cuda.gdc_wait()
    if HALVES != DOWN:
        for tile in range(program, row_tiles * tl.cdiv(HIDDEN, UP_N), programs):
            first_row, first_pair = (tile % row_tiles) * UP_M, (tile // row_tiles) * UP_N
            one, two = product_pair(
                a, gate_up, first_row, first_pair, rows, 0, K, HIDDEN, HIDDEN, K, UP_M, UP_N, UP_K, UP_TMA, PRECISION
            )
            row, pair = first_row + tl.arange(0, UP_M), first_pair + tl.arange(0, UP_N)
            factor = row_factor(square_sums, None, row, row < rows, K, NORM_BLOCKS, RMS_NORM)[:, None]
            one, two = one * factor, two * factor
            if bias is not None:
                one += of_rows(bias, time_index, row, pair, row < rows, pair < HIDDEN, 2 * HIDDEN)
                two += of_rows(bias + HIDDEN, time_index, row, pair, row < rows, pair < HIDDEN, 2 * HIDDEN)
            mask = (row < rows)[:, None] & (pair < HIDDEN)[None, :]
            y = (gelu(one) * two).to(hidden.dtype.element_ty)
            tl.store(hidden + row[:, None] * HIDDEN + pair[None, :], y, mask=mask)

    row_tiles = tl.cdiv(rows, DOWN_M)
    work = row_tiles * tl.cdiv(K, DOWN_N) * SPLITS
    if HALVES == BOTH:
        if PDL:
            k_begin, k_end = part_of(program % SPLITS, HIDDEN, DOWN_K, SPLITS)
            prefetch_rows(down_ptr, (program // SPLITS // row_tiles) * DOWN_N, K, k_begin, k_end, HIDDEN, DOWN_N)
        wait_for_all(barrier, programs)
    if HALVES != UP:
        for item in range(program, work, programs):
            tile, part = item // SPLITS, item % SPLITS
            first_row, first_column = (tile % row_tiles) * DOWN_M, (tile // row_tiles) * DOWN_N
            k_begin, k_end = part_of(part, HIDDEN, DOWN_K, SPLITS)
            y = product_tile(
                hidden_in,
                down,
                first_row,
                first_column,
                rows,
                K,
                k_begin,
                k_end,
                HIDDEN,
                DOWN_M,
                DOWN_N,
                DOWN_K,
                DOWN_TMA,
                PRECISION,
            )
            if SPLITS == 1:
                add_to_stream(
                    x, rounded, square_sums, gate, next_scale, time_index, y, first_row, first_column, rows, K
                )
            else:
                store_part(partials, tile, part, 0, y, DOWN_M * DOWN_N, SPLITS)
                if is_last(counters, tile, SPLITS):
                    y = sum_parts(partials, tile, 0, DOWN_M * DOWN_N, DOWN_M, DOWN_N, SPLITS)
                    add_to_stream(
                        x, rounded, square_sums, gate, next_scale, time_index, y, first_row, first_column, rows, K
                    )


@triton.jit
def add_to_stream(
    x, rounded, square_sums, gate, next_scale, time_index, y, first_row, first_column, rows, N: tl.constexpr
):
    """x += gate * y, with everything that the next norm needs of x."""
    row, column = first_row + tl.arange(0, y.shape[0]), first_column + tl.arange(0, y.shape[1])
    if gate is not None:
        y *= of_rows(gate, time_index, row, column, row < rows, column < N, N)
    mask = (row < rows)[:, None] & (column < N)[None, :]
    y += tl.load(x + row[:, None] * N + column[None, :], mask=mask, other=0.0)
    write_stream(x, rounded, square_sums, None, next_scale, time_index, y, first_row, first_column, rows, N)


def rmsnorm_mlp_residual(
    launcher: Launcher,
    gate_up: Tensor,
    down: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    hidden: Tensor,
    residual: Stream,
    scratch: Scratch,
) -> None:
    rows, width = hidden.shape
    k = down.shape[0]
    up_config = launcher.config("mlp_up", rows=rows, n=2 * width, k=k, dtype=down.dtype)
    down_config = launcher.config("mlp_down", rows=rows, n=k, k=width, dtype=down.dtype)
    up_tiles = divide(rows, up_config.block_m) * divide(width, up_config.block_n)
    down_tiles = divide(rows, down_config.block_m) * divide(k, down_config.block_n)
    splits = splits_that_fit(down_config, down_tiles, down_config.block_m * down_config.block_n, scratch)
    up_operands = describe(residual.rounded, gate_up, up_config)
    # What this very launch wrote must not be read by the memory accelerator: no fence stands between them.
    down_operands = describe(hidden, down, dataclasses.replace(down_config, tma=False))
    arguments: dict[str, Any] = {
        "a": up_operands["a"],
        "gate_up": up_operands["w"],
        "gate_up_ptr": gate_up,
        "bias": bias,
        "hidden_in": down_operands["a"],
        "hidden": hidden,
        "down": down_operands["w"],
        "down_ptr": down,
        "gate": gate,
        "next_scale": next_scale,
        "time_index": time_index,
        "x": residual.x,
        "rounded": residual.rounded,
        "square_sums": residual.square_sums,
        "partials": scratch.partials,
        "counters": scratch.counters,
        "barrier": scratch.barrier,
        "rows": rows,
        "HIDDEN": width,
        "K": k,
        "NORM_BLOCKS": blocks(k),
        "UP_M": up_config.block_m,
        "UP_N": up_config.block_n,
        "UP_K": up_config.block_k,
        "UP_TMA": up_operands["TMA"],
        "DOWN_M": down_config.block_m,
        "DOWN_N": down_config.block_n,
        "DOWN_K": down_config.block_k,
        "DOWN_TMA": down_operands["TMA"],
        "SPLITS": splits,
        "PDL": up_config.pdl,
        "PRECISION": precision(down.dtype),
    }
    items = max(up_tiles, down_tiles * splits)
    programs = min(items, launcher.target.multiprocessors)
    for halves in (BOTH,) if launcher.concurrent else (UP, DOWN):
        launcher(
            Launch(
                "rmsnorm_mlp_residual",
                mlp_kernel,
                (programs,),
                {**arguments, "HALVES": halves.value},
                up_config.warps,
                up_config.stages,
                up_config.pdl,
            )
        )

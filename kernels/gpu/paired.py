"""Linear layers whose columns belong together in pairs: queries and keys under RoPE, gate and up of an MLP.

A program multiplies two tiles of weight rows with the same rows of x, so that both halves of every pair are in the
same registers: RoPE turns (x1, x2) without moving them, geglu multiplies gelu(gate) by up. Pair p stands for the
weight rows p // HALF * 2 HALF + p % HALF and HALF further: HALF is half a head in RoPE, the hidden width in geglu.
"""

from __future__ import annotations

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
    row_factor,
    store_part,
    sum_parts,
)
from pi0_engine.kernels.stream import Scratch, Stream


@triton.jit
def paired_kernel(
    a,  # [rows, K], the rounded part of a stream, or a tensor descriptor of it
    w,  # [2 * PAIRS, K], or a tensor descriptor of it
    w_ptr,  # [2 * PAIRS, K]
    square_sums,  # of the stream
    bias,  # float32 [2 * PAIRS] or None; a table [2, 2 * PAIRS] for time_index
    time_index,  # int32 [rows] or None
    rope_table,  # float32 [positions, 2 * HALF], or None for geglu
    positions,  # int32 [rows], or None for geglu
    out,  # [rows, PAIRS] of geglu; queries [rows, Q_DIM] of RoPE, or None
    key,
    value,  # [rows, KV_DIM]
    partials,
    counters,
    rows,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    K: tl.constexpr,
    Q_DIM: tl.constexpr,
    KV_DIM: tl.constexpr,
    NORM_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    first_row, first_pair = (tile % row_tiles) * BLOCK_M, (tile // row_tiles) * BLOCK_N
    k_begin, k_end = part_of(part, K, BLOCK_K, SPLITS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        first = first_pair // HALF * 2 * HALF + first_pair % HALF
        prefetch_rows(w_ptr, first, 2 * PAIRS, k_begin, k_end, K, BLOCK_N)
        prefetch_rows(w_ptr, first + HALF, 2 * PAIRS, k_begin, k_end, K, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    one, two = product_pair(
        a, w, first_row, first_pair, rows, k_begin, k_end, PAIRS, HALF, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION
    )
    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        store_part(partials, tile, part, 0, one, 2 * SIZE, SPLITS)
        store_part(partials, tile, part, SIZE, two, 2 * SIZE, SPLITS)
        if not is_last(counters, tile, SPLITS):
            return
        one = sum_parts(partials, tile, 0, 2 * SIZE, BLOCK_M, BLOCK_N, SPLITS)
        two = sum_parts(partials, tile, SIZE, 2 * SIZE, BLOCK_M, BLOCK_N, SPLITS)

    row, pair = first_row + tl.arange(0, BLOCK_M), first_pair + tl.arange(0, BLOCK_N)
    factor = row_factor(square_sums, None, row, row < rows, K, NORM_BLOCKS, RMS_NORM)[:, None]
    one, two = one * factor, two * factor
    inside, column = pair % HALF, pair // HALF * 2 * HALF + pair % HALF
    if bias is not None:
        one += of_rows(bias, time_index, row, column, row < rows, pair < PAIRS, 2 * PAIRS)
        two += of_rows(bias + HALF, time_index, row, column, row < rows, pair < PAIRS, 2 * PAIRS)
    mask = (row < rows)[:, None] & (pair < PAIRS)[None, :]
    if rope_table is None:
        tl.store(out + row[:, None] * PAIRS + pair[None, :], (gelu(one) * two).to(out.dtype.element_ty), mask=mask)
    else:
        # Values are not turned: cosine 1, sine 0.
        turned = mask & (column < Q_DIM + KV_DIM)[None, :]
        position = tl.load(positions + row, mask=row < rows, other=0)
        angle = rope_table + position[:, None] * (2 * HALF) + inside[None, :]
        cosine, sine = tl.load(angle, mask=turned, other=1.0), tl.load(angle + HALF, mask=turned, other=0.0)
        one, two = one * cosine - two * sine, two * cosine + one * sine
        if out is not None:
            store_halves(out, one, two, row, column, mask & (column < Q_DIM)[None, :], Q_DIM, HALF)
        column -= Q_DIM
        store_halves(key, one, two, row, column, mask & ((column >= 0) & (column < KV_DIM))[None, :], KV_DIM, HALF)
        column -= KV_DIM
        store_halves(value, one, two, row, column, mask & (column >= 0)[None, :], KV_DIM, HALF)


@triton.jit
def store_halves(out, one, two, row, column, mask, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the heads that begin in ``column``."""
    at = out + row[:, None] * WIDTH + column[None, :]
    tl.store(at, one.to(out.dtype.element_ty), mask=mask)
    tl.store(at + HALF, two.to(out.dtype.element_ty), mask=mask)


def rmsnorm_qkv_rope(
    launcher: Launcher,
    x: Stream,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rope_table: Tensor,
    positions: Tensor,
    time_index: Tensor | None = None,
    *,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    scratch: Scratch,
) -> None:
    half = rope_table.shape[1] // 2
    arguments = {
        "rope_table": rope_table,
        "positions": positions,
        "out": q,
        "key": k,
        "value": v,
        "Q_DIM": 0 if q is None else q.shape[1],
        "KV_DIM": k.shape[1],
        "time_index": time_index,
    }
    _launch(launcher, "rmsnorm_qkv_rope", x, weight, bias, half, arguments, scratch)


def rmsnorm_geglu(
    launcher: Launcher,
    x: Stream,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    out: Tensor,
    scratch: Scratch,
) -> None:
    arguments = {
        "rope_table": None,
        "positions": None,
        "out": out,
        "key": None,
        "value": None,
        "Q_DIM": 0,
        "KV_DIM": 0,
        "time_index": None,
    }
    _launch(launcher, "rmsnorm_geglu", x, weight, bias, weight.shape[0] // 2, arguments, scratch)


def _launch(
    launcher: Launcher,
    op: str,
    x: Stream,
    weight: Tensor,
    bias: Tensor | None,
    half: int,
    arguments: dict[str, Any],
    scratch: Scratch,
) -> None:
    rows, (n, k) = x.x.shape[0], weight.shape
    config = launcher.config(op, rows=rows, n=n, k=k, dtype=weight.dtype)
    tiles = divide(rows, config.block_m) * divide(n // 2, config.block_n)
    splits = splits_that_fit(config, tiles, 2 * config.block_m * config.block_n, scratch)
    # A descriptor reads consecutive rows: a tile must not cross from one head to the next.
    operands = describe(x.rounded, weight, config, contiguous=half % config.block_n == 0)
    arguments = {
        **operands,
        "w_ptr": weight,
        "square_sums": x.square_sums,
        "bias": bias,
        **arguments,
        "partials": scratch.partials,
        "counters": scratch.counters,
        "rows": rows,
        "PAIRS": n // 2,
        "HALF": half,
        "K": k,
        "NORM_BLOCKS": blocks(k),
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PDL": config.pdl,
        "PRECISION": precision(weight.dtype),
    }
    launcher(Launch(op, paired_kernel, (tiles, splits), arguments, config.warps, config.stages, config.pdl))

"""Linear layers on the GPU: one kernel for ``linear``, ``layernorm_linear``, ``linear_residual``, ``patch_embed`` and
the ends of a network call, ``rmsnorm_linear_euler`` and ``rmsnorm_linear_second_order``.

A program computes one tile of x [rows, K] @ weight [N, K]^T, or one part of its sum, and everything that follows it:
the norm's row factor, bias or position, activation, gate, residual, and what the next layer's norm needs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.gpu.operands import blocks, describe, divide, precision, splits_that_fit
from pi0_engine.kernels.gpu.tiles import (
    NO_NORM,
    gelu,
    is_last,
    of_rows,
    part_of,
    prefetch_rows,
    product_tile,
    row_factor,
    silu,
    store_part,
    sum_parts,
    write_stream,
)
from pi0_engine.kernels.stream import Scratch, Stream

#: What becomes of a tile: stored, the beginning of a stream, added to a stream, added to a float32 matrix.
STORE, BEGIN_STREAM, ADD_TO_STREAM, ADD = (tl.constexpr(i) for i in range(4))
NO_ACTIVATION, GELU, SILU = (tl.constexpr(i) for i in range(3))
_ACTIVATIONS = {None: NO_ACTIVATION, "gelu": GELU, "silu": SILU}
_NO_GUIDE = dict.fromkeys(("previous", "prefix_weights", "max_weight", "step_weight", "time", "dt"))
_NO_BASE = dict.fromkeys(("start", "base", "base_factor", "actions_factor"))


@triton.jit
def linear_kernel(
    a,  # [rows, K], or a tensor descriptor of it
    w,  # [N, K], or a tensor descriptor of it
    w_ptr,  # [N, K]
    square_sums,
    sums,  # of the stream that a is the rounded part of, for its norm
    bias,  # float32 [N], or [BIAS_ROWS, N] repeated over the rows
    gate,  # float32 [N], or a table [2, N] for time_index
    out,  # [rows, N]
    out_rounded,
    out_square_sums,
    out_sums,
    next_scale,  # the other parts of a stream, if out is one
    previous,  # float32 [rows, N]: what a sum with out is pulled towards, or None
    prefix_weights,  # float32 [rows]
    max_weight,  # float32 [1]
    step_weight,
    time,
    dt,  # numbers
    start,  # float32 [rows, N]: what is added to instead of out, or None
    base,  # float32 [rows, N]: another such sum
    base_factor,
    actions_factor,  # numbers: how much of the product goes into base and into out
    time_index,  # int32 [rows], or None
    partials,
    counters,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BLOCKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs that run together share a tile of weights, which are read from memory; x stays in L2.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    first_row, first_column = (tile % row_tiles) * BLOCK_M, (tile // row_tiles) * BLOCK_N
    k_begin, k_end = part_of(part, K, BLOCK_K, SPLITS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_rows(w_ptr, first_column, N, k_begin, k_end, K, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    y = product_tile(
        a, w, first_row, first_column, rows, N, k_begin, k_end, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION
    )
    if SPLITS > 1:
        store_part(partials, tile, part, 0, y, BLOCK_M * BLOCK_N, SPLITS)
        if not is_last(counters, tile, SPLITS):
            return
        y = sum_parts(partials, tile, 0, BLOCK_M * BLOCK_N, BLOCK_M, BLOCK_N, SPLITS)

    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    if NORM != NO_NORM:
        y *= row_factor(square_sums, sums, row, row < rows, K, NORM_BLOCKS, NORM)[:, None]
    if bias is not None:
        if BIAS_ROWS > 1:
            at = (row % BIAS_ROWS)[:, None] * N + column[None, :]
            y += tl.load(bias + at, mask=(column < N)[None, :], other=0.0)
        else:
            y += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    if ACTIVATION == GELU:
        y = gelu(y)
    if ACTIVATION == SILU:
        y = silu(y)
    if gate is not None:
        y *= of_rows(gate, time_index, row, column, row < rows, column < N, N)
    at = row[:, None] * N + column[None, :]
    mask = (row < rows)[:, None] & (column < N)[None, :]
    if OUTPUT == ADD or OUTPUT == ADD_TO_STREAM:
        if base is not None:
            before = tl.load(start + at, mask=mask, other=0.0)
        else:
            before = tl.load(out + at, mask=mask, other=0.0)
        if previous is not None:
            g = tl.minimum(step_weight, tl.load(max_weight)) * tl.load(prefix_weights + row, mask=row < rows, other=0.0)
            y -= g[:, None] * (time * y + dt * (tl.load(previous + at, mask=mask, other=0.0) - before))
        if OUTPUT == ADD:
            if time_index is not None:  # given rows stay as they are
                y = tl.where((tl.load(time_index + row, mask=row < rows, other=0) == 0)[:, None], y, 0.0)
        if base is not None:
            tl.store(base + at, before + base_factor * y, mask=mask)
            y *= actions_factor
        y += before
    if OUTPUT == STORE or OUTPUT == ADD:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    else:
        write_stream(
            out, out_rounded, out_square_sums, out_sums, next_scale, time_index, y, first_row, first_column, rows, N
        )


def linear(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    out: Tensor | Stream,
    scratch: Scratch,
) -> None:
    _launch(
        launcher,
        "linear",
        x,
        weight,
        out,
        scratch,
        bias=bias,
        activation=activation,
        next_scale=next_scale,
        time_index=time_index,
    )


def linear_residual(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    next_scale: Tensor | None,
    time_index: Tensor | None = None,
    *,
    residual: Stream,
    scratch: Scratch,
) -> None:
    _launch(
        launcher,
        "linear_residual",
        x,
        weight,
        residual,
        scratch,
        bias=bias,
        gate=gate,
        next_scale=next_scale,
        time_index=time_index,
        add=True,
    )


def layernorm_linear(
    launcher: Launcher,
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    *,
    out: Tensor | Stream,
    scratch: Scratch,
) -> None:
    _launch(launcher, "layernorm_linear", x.rounded, weight, out, scratch, norm_of=x, bias=bias, activation=activation)


def patch_embed(
    launcher: Launcher, patches: Tensor, weight: Tensor, position: Tensor, *, out: Stream, scratch: Scratch
) -> None:
    _launch(launcher, "patch_embed", patches, weight, out, scratch, bias=position)


def rmsnorm_linear_euler(
    launcher: Launcher,
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    previous: Tensor,
    prefix_weights: Tensor,
    max_weight: Tensor,
    step_weight: float,
    time: float,
    dt: float,
    time_index: Tensor | None = None,
    *,
    actions: Tensor,
    scratch: Scratch,
) -> None:
    guide = {
        "previous": previous,
        "prefix_weights": prefix_weights,
        "max_weight": max_weight,
        "step_weight": step_weight,
        "time": time,
        "dt": dt,
    }
    _launch(
        launcher,
        "rmsnorm_linear_euler",
        x.x,
        weight,
        actions,
        scratch,
        norm_of=x,
        bias=bias,
        time_index=time_index,
        add=True,
        guide=guide,
    )


def rmsnorm_linear_second_order(
    launcher: Launcher,
    x: Stream,
    weight: Tensor,
    bias: Tensor,
    start: Tensor,
    base_factor: float,
    actions_factor: float,
    time_index: Tensor | None = None,
    *,
    base: Tensor,
    actions: Tensor,
    scratch: Scratch,
) -> None:
    """By the Euler step's launch configuration: the product, and so its tiles, are the same."""
    _launch(
        launcher,
        "rmsnorm_linear_second_order",
        x.x,
        weight,
        actions,
        scratch,
        norm_of=x,
        bias=bias,
        time_index=time_index,
        add=True,
        configured_as="rmsnorm_linear_euler",
        based={"start": start, "base": base, "base_factor": base_factor, "actions_factor": actions_factor},
    )


def _launch(
    launcher: Launcher,
    op: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor | Stream,
    scratch: Scratch,
    *,
    norm_of: Stream | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    next_scale: Tensor | None = None,
    time_index: Tensor | None = None,
    add: bool = False,
    guide: dict[str, Any] | None = None,
    based: dict[str, Any] | None = None,
    configured_as: str | None = None,
) -> None:
    """x [rows, K], weight [N, K] of one dtype; the rest as in the kernel.

    ``configured_as`` names the op by whose launch configurations it runs, where it has none of its own.
    """
    rows, (n, k) = x.shape[0], weight.shape
    config = launcher.config(configured_as or op, rows=rows, n=n, k=k, dtype=weight.dtype)
    tiles = divide(rows, config.block_m) * divide(n, config.block_n)
    splits = splits_that_fit(config, tiles, config.block_m * config.block_n, scratch)
    stream = out if isinstance(out, Stream) else None
    norm = {None: 0, False: 1, True: 2}[None if norm_of is None else norm_of.sums is not None]
    operands = describe(x, weight, config)
    arguments: dict[str, Any] = {
        **operands,
        "w_ptr": weight,
        "square_sums": norm_of.square_sums if norm_of else None,
        "sums": norm_of.sums if norm_of else None,
        "bias": bias,
        "gate": gate,
        "out": out if stream is None else stream.x,
        "out_rounded": stream.rounded if stream else None,
        "out_square_sums": stream.square_sums if stream else None,
        "out_sums": stream.sums if stream else None,
        "next_scale": next_scale,
        **(guide or _NO_GUIDE),
        **(based or _NO_BASE),
        "time_index": time_index,
        "partials": scratch.partials,
        "counters": scratch.counters,
        "rows": rows,
        "N": n,
        "K": k,
        "BIAS_ROWS": bias.shape[0] if bias is not None and bias.ndim == 2 else 1,
        "NORM": norm,
        "NORM_BLOCKS": blocks(k),
        "ACTIVATION": _ACTIVATIONS[activation].value,
        "OUTPUT": (ADD_TO_STREAM if add else BEGIN_STREAM).value if stream else (ADD if add else STORE).value,
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PDL": config.pdl,
        "PRECISION": precision(weight.dtype),
    }
    launcher(Launch(op, linear_kernel, (tiles, splits), arguments, config.warps, config.stages, config.pdl))

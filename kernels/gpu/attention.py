"""Attention on the GPU: one kernel for images, prefix and suffix.

The query heads that share a KV head are rows of one matrix, so that its keys are read once for all of them: row r is
token r // GROUP, head r % GROUP. Softmax runs along the keys in blocks. Where one pass over the keys would leave
multiprocessors idle (50 action tokens are 400 rows), their range is split; the last program to finish combines.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from pi0_engine.kernels.gpu.attention_tiles import NEVER, attend, prefetch_share
from pi0_engine.kernels.gpu.launch import Launch, Launcher
from pi0_engine.kernels.gpu.operands import divide, power_of_two, precision, splits_that_fit
from pi0_engine.kernels.gpu.tiles import is_last, store_part
from pi0_engine.kernels.stream import Scratch

#: tl.dot multiplies at least this many columns.
_SMALLEST_DOT = 16


@triton.jit
def attention_kernel(
    q,
    k,
    v,  # of the prefix (or of an image)
    suffix_k,
    suffix_v,  # or None
    lengths,  # int32 [observations], valid prefix keys, or None where all are
    out,
    ahead,  # weights to bring into L2 meanwhile, or None
    partials,
    counters,
    scale,  # head_dim^-0.5 * log2(e): probabilities are powers of two
    tokens,  # queries of a sequence
    prefix,  # keys of an observation
    chunks,  # sequences that are action chunks; those behind them are state tokens
    samples,  # chunks of an observation
    ahead_lines,  # cache lines of ``ahead`` per program
    Q_STRIDE: tl.constexpr,
    KV_STRIDE: tl.constexpr,
    SUFFIX_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,  # head_dim as a power of two ...
    TAIL: tl.constexpr,  # ... and another, or 0: 72 = 64 + 8, of which tl.dot makes 16
    STATES: tl.constexpr,  # state tokens per observation: 0 or 1
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    sequence, head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if ahead is not None:
        program = (tl.program_id(2) * SPLITS + part) * tl.num_programs(0) + tile
        prefetch_share(ahead, program, ahead_lines)
    if PDL:
        tl.extra.cuda.gdc_wait()

    is_state = sequence >= chunks
    observation = tl.where(is_state, sequence - chunks, sequence // samples)
    first_token = tl.where(is_state, chunks * tokens + observation, sequence * tokens)
    query_rows = tl.where(is_state, 1, tokens) * GROUP
    if tile * BLOCK_M >= query_rows:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_row = row < query_rows
    token, query_head = first_token + row // GROUP, head * GROUP + row % GROUP
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL > 0 else 1)
    q_row = q + token * Q_STRIDE + query_head * HEAD_DIM
    q_main = tl.load(q_row[:, None] + main[None, :], mask=valid_row[:, None] & (main < HEAD_DIM)[None, :], other=0.0)
    q_tail = q_main
    if TAIL > 0:
        tail_mask = valid_row[:, None] & (tail < HEAD_DIM)[None, :]
        q_tail = tl.load(q_row[:, None] + tail[None, :], mask=tail_mask, other=0.0)

    length = prefix
    if lengths is not None:
        length = tl.load(lengths + observation)
    prefix_tiles = tl.cdiv(length, BLOCK_N)
    key_tiles = prefix_tiles
    if suffix_k is not None:
        key_tiles += tl.cdiv(tokens + STATES, BLOCK_N)
    share = tl.cdiv(key_tiles, SPLITS)
    begin = tl.minimum(part * share, key_tiles)
    end = tl.minimum(begin + share, key_tiles)

    best = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, MAIN), tl.float32)
    mixed_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 1), tl.float32)
    for t in range(tl.minimum(begin, prefix_tiles), tl.minimum(end, prefix_tiles)):
        key = t * BLOCK_N + tl.arange(0, BLOCK_N)
        key_row = observation * prefix + tl.minimum(key, prefix - 1)
        best, total, mixed, mixed_tail = attend(
            q_main,
            q_tail,
            k + head * HEAD_DIM + key_row * KV_STRIDE,
            v + head * HEAD_DIM + key_row * KV_STRIDE,
            key < length,
            scale,
            best,
            total,
            mixed,
            mixed_tail,
            HEAD_DIM,
            MAIN,
            TAIL,
            PRECISION,
        )
    if suffix_k is not None:
        for t in range(tl.maximum(begin, prefix_tiles), tl.maximum(end, prefix_tiles)):
            # A chunk's own actions, then the state token of its observation, which sees only itself among them.
            key = (t - prefix_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            seen = (key < tokens + STATES) & ((key == tokens) | (sequence < chunks))
            own = tl.minimum(sequence, chunks - 1) * tokens + key
            key_row = tl.where(key < tokens, own, tl.where(seen, chunks * tokens + observation, 0))
            best, total, mixed, mixed_tail = attend(
                q_main,
                q_tail,
                suffix_k + head * HEAD_DIM + key_row * SUFFIX_STRIDE,
                suffix_v + head * HEAD_DIM + key_row * SUFFIX_STRIDE,
                seen,
                scale,
                best,
                total,
                mixed,
                mixed_tail,
                HEAD_DIM,
                MAIN,
                TAIL,
                PRECISION,
            )

    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_M * (MAIN + TAIL + 2)
        slot = tl.program_id(2) * tl.num_programs(0) + tile
        at = partials + (slot * SPLITS + part) * SIZE + BLOCK_M * (MAIN + TAIL) + tl.arange(0, BLOCK_M)
        store_part(partials, slot, part, 0, mixed, SIZE, SPLITS)
        if TAIL > 0:
            store_part(partials, slot, part, BLOCK_M * MAIN, mixed_tail, SIZE, SPLITS)
        tl.store(at, best)
        tl.store(at + BLOCK_M, total)
        if not is_last(counters, slot, SPLITS):
            return
        best = tl.full((BLOCK_M,), NEVER, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, MAIN), tl.float32)
        mixed_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 1), tl.float32)
        line = tl.arange(0, BLOCK_M)
        for other in range(SPLITS):
            stored = partials + (slot * SPLITS + other) * SIZE
            numbers = stored + BLOCK_M * (MAIN + TAIL) + line
            other_best = tl.load(numbers, cache_modifier=".cg")
            higher = tl.maximum(best, other_best)
            keep, take = tl.exp2(best - higher), tl.exp2(other_best - higher)
            total = total * keep + tl.load(numbers + BLOCK_M, cache_modifier=".cg") * take
            values = tl.load(stored + line[:, None] * MAIN + main[None, :], cache_modifier=".cg")
            mixed = mixed * keep[:, None] + values * take[:, None]
            if TAIL > 0:
                at_tail = stored + BLOCK_M * MAIN + line[:, None] * TAIL + tl.arange(0, TAIL)[None, :]
                values = tl.load(at_tail, cache_modifier=".cg")
                mixed_tail = mixed_tail * keep[:, None] + values * take[:, None]
            best = higher

    out_row = out + token * OUT_STRIDE + query_head * HEAD_DIM
    mask = valid_row[:, None] & (main < HEAD_DIM)[None, :]
    tl.store(out_row[:, None] + main[None, :], (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)
    if TAIL > 0:
        mask = valid_row[:, None] & (tail < HEAD_DIM)[None, :]
        tl.store(out_row[:, None] + tail[None, :], (mixed_tail / total[:, None]).to(out.dtype.element_ty), mask=mask)


def vision_attention(launcher: Launcher, qkv: Tensor, num_heads: int, *, out: Tensor, scratch: Scratch) -> None:
    images, patches, width = out.shape
    q, k, v = qkv.chunk(3, dim=-1)
    _launch(
        launcher,
        "vision_attention",
        (q, k, v),
        (None, None),
        None,
        out,
        scratch,
        tokens=patches,
        prefix=patches,
        chunks=images,
        samples=1,
        sequences=images,
        kv_heads=num_heads,
        head_dim=width // num_heads,
    )


def prefix_attention(
    launcher: Launcher,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    head_dim: int,
    *,
    out: Tensor,
    scratch: Scratch,
) -> None:
    batch = q.shape[0]
    _launch(
        launcher,
        "prefix_attention",
        (q, k, v),
        (None, None),
        lengths,
        out,
        scratch,
        tokens=q.shape[1],
        prefix=k.shape[1],
        chunks=batch,
        samples=1,
        sequences=batch,
        kv_heads=k.shape[2] // head_dim,
        head_dim=head_dim,
    )


def suffix_attention(
    launcher: Launcher,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    lengths: Tensor | None,
    horizon: int,
    chunks: int,
    head_dim: int,
    ahead: Tensor | None,
    *,
    out: Tensor,
    scratch: Scratch,
) -> None:
    batch, prefix, kv_dim = prefix_k.shape
    _launch(
        launcher,
        "suffix_attention",
        (q, prefix_k, prefix_v),
        (suffix_k, suffix_v),
        lengths,
        out,
        scratch,
        tokens=horizon,
        prefix=prefix,
        chunks=chunks,
        samples=chunks // batch,
        sequences=chunks + q.shape[0] - chunks * horizon,
        kv_heads=kv_dim // head_dim,
        head_dim=head_dim,
        states=int(suffix_k.shape[0] > chunks * horizon),
        ahead=ahead,
    )


def _launch(
    launcher: Launcher,
    op: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    suffix: tuple[Tensor | None, Tensor | None],
    lengths: Tensor | None,
    out: Tensor,
    scratch: Scratch,
    *,
    tokens: int,
    prefix: int,
    chunks: int,
    samples: int,
    sequences: int,
    kv_heads: int,
    head_dim: int,
    states: int = 0,
    ahead: Tensor | None = None,
) -> None:
    q, k, v = qkv
    group = out.shape[-1] // head_dim // kv_heads
    config = launcher.config(op, rows=tokens * group, n=prefix, k=head_dim, dtype=q.dtype)
    main, tail = head_parts(head_dim)
    tiles = divide(tokens * group, config.block_m)
    slots, size = tiles * sequences * kv_heads, config.block_m * (main + tail + 2)
    splits = splits_that_fit(config, slots, size, scratch)
    lines = 0
    if ahead is not None and config.ahead_bytes:
        # Whole steps of the kernel's loop, and nothing behind the end of the matrix.
        lines = min(config.ahead_bytes, ahead.numel() * ahead.element_size()) // (128 * slots * splits) // 128 * 128
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "suffix_k": suffix[0],
        "suffix_v": suffix[1],
        "lengths": lengths,
        "out": out,
        "ahead": ahead if lines else None,
        "partials": scratch.partials,
        "counters": scratch.counters,
        "scale": head_dim**-0.5 * math.log2(math.e),
        "tokens": tokens,
        "prefix": prefix,
        "chunks": chunks,
        "samples": samples,
        "ahead_lines": lines,
        "Q_STRIDE": q.stride(-2),
        "KV_STRIDE": k.stride(-2),
        "SUFFIX_STRIDE": 0 if suffix[0] is None else suffix[0].stride(-2),
        "OUT_STRIDE": out.stride(-2),
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": tail,
        "STATES": states,
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": config.pdl,
        "PRECISION": precision(q.dtype),
    }
    grid = (tiles, splits, sequences * kv_heads)
    launcher(Launch(op, attention_kernel, grid, arguments, config.warps, config.stages, config.pdl))


def head_parts(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and a smaller one (or 0), each enough for a matrix product: 72 -> 64, 16."""
    whole = max(power_of_two(head_dim), _SMALLEST_DOT)
    if whole == head_dim or whole == _SMALLEST_DOT:
        return whole, 0
    main = whole // 2
    tail = max(power_of_two(head_dim - main), _SMALLEST_DOT)
    return (whole, 0) if main + tail >= whole else (main, tail)

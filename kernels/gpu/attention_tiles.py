"""What the attention kernel is made of: one block of keys, and the prefetch of weights meanwhile."""

from __future__ import annotations

import triton
import triton.language as tl

from pi0_engine.kernels.gpu.tiles import LINE, prefetch

#: Stands for minus infinity: the difference of two is 0, not NaN. A row that has seen only such keys counts nothing
#: once a real one comes.
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def attend(
    q_main,
    q_tail,
    k_row,
    v_row,
    seen,
    scale,
    best,
    total,
    mixed,
    mixed_tail,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys: running maximum and sum of each row, and the values mixed so far, all float32."""
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL > 0 else 1)
    k_main = load_columns(k_row, main, HEAD_DIM, MAIN)
    score = tl.dot(q_main, k_main.T, input_precision=PRECISION)
    if TAIL > 0:
        k_tail = load_columns(k_row, tail, HEAD_DIM, MAIN + TAIL)
        score = tl.dot(q_tail, k_tail.T, score, input_precision=PRECISION)
    score = tl.where(seen[None, :], score * scale, NEVER)
    higher = tl.maximum(best, tl.max(score, axis=1))
    probability = tl.exp2(score - higher[:, None])
    keep = tl.exp2(best - higher)
    total = total * keep + tl.sum(probability, axis=1)
    v_main = load_columns(v_row, main, HEAD_DIM, MAIN)
    probability = probability.to(v_main.dtype)
    mixed = tl.dot(probability, v_main, mixed * keep[:, None], input_precision=PRECISION)
    if TAIL > 0:
        v_tail = load_columns(v_row, tail, HEAD_DIM, MAIN + TAIL)
        mixed_tail = tl.dot(probability, v_tail, mixed_tail * keep[:, None], input_precision=PRECISION)
    return higher, total, mixed, mixed_tail


@triton.jit
def load_columns(row, column, HEAD_DIM: tl.constexpr, END: tl.constexpr):
    """Columns of each row; zero from HEAD_DIM on, which END may exceed."""
    if END <= HEAD_DIM:
        return tl.load(row[:, None] + column[None, :])
    else:
        return tl.load(row[:, None] + column[None, :], mask=(column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def prefetch_share(address, program, lines):
    """Bring this program's share of a matrix into L2: ``lines`` cache lines, a multiple of 128."""
    STEP: tl.constexpr = LINE // (address.dtype.element_ty.primitive_bitwidth // 8)
    for line in range(program * lines, (program + 1) * lines, 128):
        prefetch(address + (line + tl.arange(0, 128)) * STEP)

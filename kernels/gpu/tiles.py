"""What the kernels are made of: one tile of a matrix product, the row factor of a norm, parts that are added up.

Every matrix is row-major. A linear layer's weight is [N, K], so a tile of the product reads rows of both operands.
Capital names are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Epsilon of every norm (NORM_EPS of kernels/norm_linear.py), and how the row factor is formed.
EPS = tl.constexpr(1e-6)
NO_NORM = tl.constexpr(0)
RMS_NORM = tl.constexpr(1)
LAYER_NORM = tl.constexpr(2)
#: Columns per partial sum (SUM_COLUMNS of kernels/stream.py).
SUM_COLUMNS = tl.constexpr(64)
#: Bytes that one prefetch instruction brings into L2: a cache line.
LINE = tl.constexpr(128)
#: Products of which weights are prefetched: all that a program of the flow loop reads, and of the prefix's long rows as
#: much as 132 tiles of 128 rows may take of a 50 MB L2 (34 MB).
PREFETCH_K = tl.constexpr(1024)


@triton.jit
def product_tile(
    a,
    w,
    first_row,
    first_column,
    rows,
    columns,
    k_begin,
    k_end,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: a [rows, K] times w [columns, K] transposed over k_begin..k_end.

    With TMA, ``a`` and ``w`` are tensor descriptors: what lies outside is read as zero. Otherwise they are pointers,
    and rows outside wrap around: their results are never stored, and unmasked loads pipeline better.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(k_begin, k_end, BLOCK_K):
            total = tl.dot(a.load([first_row, k]), w.load([first_column, k]).T, total, input_precision=PRECISION)
    else:
        row = (first_row + tl.arange(0, BLOCK_M)) % rows
        column = (first_column + tl.arange(0, BLOCK_N)) % columns
        inner = tl.arange(0, BLOCK_K)
        a_tile = a + row[:, None] * K + inner[None, :]
        w_tile = w + column[:, None] * K + inner[None, :]
        for k in range(k_begin, k_end, BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(a_tile + k)
                y = tl.load(w_tile + k)
            else:
                x = tl.load(a_tile + k, mask=(inner < K - k)[None, :], other=0.0)
                y = tl.load(w_tile + k, mask=(inner < K - k)[None, :], other=0.0)
            total = tl.dot(x, y.T, total, input_precision=PRECISION)
    return total


@triton.jit
def product_pair(
    a,
    w,
    first_row,
    first_pair,
    rows,
    k_begin,
    k_end,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Two float32 [BLOCK_M, BLOCK_N]: a [rows, K] times the first, and the second, weight row of each pair."""
    one = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        first = first_pair // HALF * 2 * HALF + first_pair % HALF
        for k in range(k_begin, k_end, BLOCK_K):
            x = a.load([first_row, k])
            one = tl.dot(x, w.load([first, k]).T, one, input_precision=PRECISION)
            two = tl.dot(x, w.load([first + HALF, k]).T, two, input_precision=PRECISION)
    else:
        row = (first_row + tl.arange(0, BLOCK_M)) % rows
        pair = (first_pair + tl.arange(0, BLOCK_N)) % PAIRS
        inner = tl.arange(0, BLOCK_K)
        a_tile = a + row[:, None] * K + inner[None, :]
        w_tile = w + (pair // HALF * 2 * HALF + pair % HALF)[:, None] * K + inner[None, :]
        for k in range(k_begin, k_end, BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(a_tile + k)
                y = tl.load(w_tile + k)
                z = tl.load(w_tile + HALF * K + k)
            else:
                inside = (inner < K - k)[None, :]
                x = tl.load(a_tile + k, mask=inside, other=0.0)
                y = tl.load(w_tile + k, mask=inside, other=0.0)
                z = tl.load(w_tile + HALF * K + k, mask=inside, other=0.0)
            one = tl.dot(x, y.T, one, input_precision=PRECISION)
            two = tl.dot(x, z.T, two, input_precision=PRECISION)
    return one, two


@triton.jit
def part_of(part, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """First and last product of one of SPLITS parts; a part may be empty."""
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    begin = part * length
    return tl.minimum(begin, K), tl.minimum(begin + length, K)


@triton.jit
def row_factor(square_sums, sums, row, valid, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr):
    """float32 [BLOCK_M]: 1 / rms or 1 / standard deviation of stream rows ``row``, from their partial sums."""
    COUNT: tl.constexpr = (WIDTH + SUM_COLUMNS - 1) // SUM_COLUMNS
    block = tl.arange(0, BLOCKS)
    at = row[:, None] * COUNT + block[None, :]
    mask = valid[:, None] & (block < COUNT)[None, :]
    square = tl.sum(tl.load(square_sums + at, mask=mask, other=0.0), axis=1) / WIDTH
    if NORM == LAYER_NORM:
        mean = tl.sum(tl.load(sums + at, mask=mask, other=0.0), axis=1) / WIDTH
        square -= mean * mean
    return tl.rsqrt(square + EPS)


@triton.jit
def write_stream(
    x_ptr, rounded, square_sums, sums, next_scale, time_index, x, first_row, first_column, rows, N: tl.constexpr
):
    """Store the tile ``x`` of a residual stream: itself, its rounded copy and its partial sums (kernels/stream.py)."""
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    COUNT: tl.constexpr = (N + SUM_COLUMNS - 1) // SUM_COLUMNS
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < N)[None, :]
    at = row[:, None] * N + column[None, :]
    x = tl.where(mask, x, 0.0)
    tl.store(x_ptr + at, x, mask=mask)
    # The copy before the sums: the other way round ptxas spills for sm_100.
    y = x
    if next_scale is not None:
        y = x * of_rows(next_scale, time_index, row, column, row < rows, column < N, N)
    tl.store(rounded + at, y.to(rounded.dtype.element_ty), mask=mask)
    block = first_column // SUM_COLUMNS + tl.arange(0, BLOCK_N // SUM_COLUMNS)
    sums_at = row[:, None] * COUNT + block[None, :]
    sums_mask = (row < rows)[:, None] & (block < COUNT)[None, :]
    tl.store(square_sums + sums_at, block_sums(x * x), mask=sums_mask)
    if sums is not None:
        tl.store(sums + sums_at, block_sums(x), mask=sums_mask)


@triton.jit
def of_rows(terms, time_index, row, column, row_mask, column_mask, N: tl.constexpr):
    """Terms of adaRMS that go with a tile (kernels/stream.py): [1, BLOCK_N] of ``terms`` [N], the same for all rows.

    With ``time_index`` int32 [rows], [BLOCK_M, BLOCK_N]: the entries that it names of a table [2, N].
    """
    if time_index is None:
        return tl.load(terms + column, mask=column_mask, other=0.0)[None, :]
    else:
        entry = tl.load(time_index + row, mask=row_mask, other=0)
        own = entry[:, None] * N + column[None, :]
        return tl.load(terms + own, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def block_sums(x):
    """float32 [BLOCK_M, BLOCK_N / SUM_COLUMNS]: sums over each SUM_COLUMNS columns of a tile."""
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    return tl.sum(tl.reshape(x, (BLOCK_M, BLOCK_N // SUM_COLUMNS, SUM_COLUMNS)), axis=2)


@triton.jit
def store_part(partials, tile, part, offset, value, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Leave one part of a tile's sum, or of SIZE values of which it is some, in memory."""
    BLOCK_M: tl.constexpr = value.shape[0]
    BLOCK_N: tl.constexpr = value.shape[1]
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partials + (tile * SPLITS + part) * SIZE + offset + inside, value)


@triton.jit
def is_last(counters, tile, SPLITS: tl.constexpr):
    """Whether all other parts of the tile were in memory before this program's; the counter is then zero again.

    The barrier puts the stores of all threads before the one thread's release; its acquire puts them before what
    follows.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.atomic_xchg(counters + tile, 0, sem="relaxed")
    return last


@triton.jit
def wait_for_all(barrier, programs):
    """Return when every program of the launch has come here; all of them must be running.

    ``barrier`` int32 [2] is zero before and after: the last program that leaves resets it.
    """
    tl.debug_barrier()
    tl.atomic_add(barrier, 1, sem="release")
    while tl.atomic_add(barrier, 0, sem="acquire") < programs:
        pass
    tl.debug_barrier()
    if tl.atomic_add(barrier + 1, 1, sem="relaxed") == programs - 1:
        tl.atomic_xchg(barrier, 0, sem="relaxed")
        tl.atomic_xchg(barrier + 1, 0, sem="relaxed")


@triton.jit
def sum_parts(
    partials, tile, offset, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr
):
    """The parts of a tile in their order, whoever arrived last: the sum is the same bit for bit in every run.

    They come from other multiprocessors: ``.cg`` reads past this one's L1.
    """
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(SPLITS):
        total += tl.load(partials + (tile * SPLITS + part) * SIZE + offset + inside, cache_modifier=".cg")
    return total


@triton.jit
def gelu(x):
    """gelu in its tanh form: 0.5 x (1 + tanh(z)) = x sigmoid(2 z)."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def prefetch_rows(w, first_row, rows, k_begin, k_end, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask L2 for rows first_row.. of w [rows, K], columns k_begin..k_end, a cache line at a time.

    Weights depend on no other kernel, so this may run before the wait for the previous one.
    """
    STEP: tl.constexpr = LINE // (w.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.minimum(first_row + tl.arange(0, BLOCK_N), rows - 1)
    for k in range(k_begin, tl.minimum(k_end, k_begin + PREFETCH_K), 8 * STEP):
        column = tl.minimum(k + tl.arange(0, 8) * STEP, k_end - 1)
        prefetch(w + row[:, None] * K + column[None, :])


@triton.jit
def prefetch(address):
    """Bring the cache lines of a tile of pointers into L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [address.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )

"""Small Triton kernels that show what a compile check must see, and their launches on torch's meta device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from pi0_engine.kernels.gpu.launch import Launch


@triton.jit
def masked_gemm(
    x, weight, out, rows, columns, products, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out [rows, columns] = x [rows, products] @ weight [columns, products]^T, row-major, no length a multiple."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, products, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < products
        a = tl.load(x + m[:, None] * products + k[None, :], (m < rows)[:, None] & inside[None, :], 0.0)
        b = tl.load(weight + n[None, :] * products + k[:, None], (n < columns)[None, :] & inside[:, None], 0.0)
        total = tl.dot(a, b, total)
    where = out + m[:, None] * columns + n[None, :]
    tl.store(where, total.to(out.dtype.element_ty), (m < rows)[:, None] & (n < columns)[None, :])


@triton.jit
def tiled_gemm(x, weight, out, products, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """As :func:`masked_gemm`, through tensor descriptors."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, products, BLOCK_K):
        total = tl.dot(x.load([m, k]), weight.load([n, k]).T, total)
    out.store([m, n], total.to(out.dtype))


@triton.jit
def dependent_add(x, out, count, BLOCK: tl.constexpr):
    """out [count] = x [count] + 1, where the kernel before may still be writing x."""
    gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < count) + 1, i < count)
    gdc_launch_dependents()


@triton.jit
def normalize(x, out, COUNT: tl.constexpr):
    """out [COUNT] = x [COUNT] / sum(x), in one program."""
    i = tl.arange(0, COUNT)
    values = tl.load(x + i)
    tl.store(out + i, values / tl.sum(values))


@triton.jit
def attention(q, k, v, out, rows, keys, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [rows, HEAD_DIM] = softmax(q [rows, HEAD_DIM] k [keys, HEAD_DIM]^T scale) v, one program per BLOCK_M rows."""
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    query = tl.load(q + m[:, None] * HEAD_DIM + d[None, :], (m < rows)[:, None], 0.0)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = tl.load(k + n[None, :] * HEAD_DIM + d[:, None], (n < keys)[None, :], 0.0)
        scores = tl.where((n < keys)[None, :], tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
        value = tl.load(v + n[:, None] * HEAD_DIM + d[None, :], (n < keys)[:, None], 0.0)
        total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        highest = higher
    where = out + m[:, None] * HEAD_DIM + d[None, :]
    tl.store(where, (total / mass[:, None]).to(out.dtype.element_ty), (m < rows)[:, None])


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def gemm(rows: int = 276, block: tuple[int, int, int] = (64, 64, 32), warps: int = 4, stages: int = 3) -> Launch:
    """276 rows of 4304 products, 1152 columns: what a layer of SigLIP computes."""
    x, weight, out = matrix(rows, 4304), matrix(1152, 4304), matrix(rows, 1152)
    sizes = {"rows": rows, "columns": 1152, "products": 4304}
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    grid = (triton.cdiv(rows, block[0]), triton.cdiv(1152, block[1]))
    return Launch("linear", masked_gemm, grid, {"x": x, "weight": weight, "out": out, **sizes, **blocks}, warps, stages)


def spilling() -> Launch:
    """16384 values that have to stay until their sum is known, in one warp: 512 registers per thread, of 255."""
    x = torch.empty(16384, device="meta")
    return Launch("norm", normalize, (1,), {"x": x, "out": x, "COUNT": 16384}, 1, 1)


def overflowing() -> Launch:
    """Five stages of (128 + 256) x 64 bfloat16 and more: at least 240 KiB, of 227 at most."""
    return gemm(block=(128, 256, 64), warps=8, stages=6)


def tma_gemm() -> Launch:
    m, n, k, block = 512, 2048, 1024, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    arguments = {
        "x": TensorDescriptor.from_tensor(matrix(m, k), [128, 64]),
        "weight": TensorDescriptor.from_tensor(matrix(n, k), [128, 64]),
        "out": TensorDescriptor.from_tensor(matrix(m, n), [128, 128]),
        "products": k,
    }
    return Launch("linear", tiled_gemm, (4, 16), {**arguments, **block}, 8, 3)


def dependent(pdl: bool = True) -> Launch:
    x = torch.empty(1000, device="meta")
    return Launch("add", dependent_add, (8,), {"x": x, "out": x, "count": 1000, "BLOCK": 128}, 4, 1, pdl=pdl)


def attention_256(block_m: int = 128, block_n: int = 64, warps: int = 8, stages: int = 2) -> Launch:
    """256 wide heads, as in Gemma."""
    q, k, out = matrix(788, 256), matrix(788, 256), matrix(788, 256)
    sizes = {"rows": 788, "keys": 788, "scale": 0.09, "HEAD_DIM": 256, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return Launch("attention", attention, (7,), {"q": q, "k": k, "v": k, "out": out, **sizes}, warps, stages)

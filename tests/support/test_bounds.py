"""The bounds that kernels and ops are held to, against mistakes that are easily made: each is beyond them.

And against the roundings that they must allow: a sum of 600 products one after the other, the worst order there is.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import op_checks
from tests.support.models import rel_l2
from tests.support.op_checks import layer_norm, randn, rms_norm, tf32, weight

triton_ops = pytest.importorskip("tests.support.triton_ops", reason="Triton is not installed")

#: The loosest of the bounds on a float32 result, and on a bfloat16 one.
LOOSEST = {
    dtype: max(bounds[dtype] for bounds in (op_checks.BOUND, triton_ops.BOUND))
    for dtype in (torch.float32, torch.bfloat16)
}
ROWS, K, N = 33, 600, 72


def rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE at positions 0, 1, ...: float64 [rows, 2 n] for n frequencies."""
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies.double()
    x1, x2 = x.double().chunk(2, dim=-1)
    return torch.cat([x1 * angles.cos() - x2 * angles.sin(), x2 * angles.cos() + x1 * angles.sin()], dim=-1)


def norm_with(x: Tensor, eps: float) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()


def mistakes() -> dict[str, tuple[Tensor, Tensor]]:
    """What was computed by mistake, and what should have been; everything else in float64."""
    x, w = randn(ROWS, K), weight(N, K)
    right = x.double() @ w.double().T
    frequencies = 10_000.0 ** -(torch.arange(36) / 36)
    bf16_frequencies = frequencies.bfloat16().float()
    return {
        "TF32 operands": (tf32(x) @ tf32(w).T, right),
        "bfloat16 operands": (x.bfloat16().double() @ w.bfloat16().double().T, right),
        "the last of 600 products left out": (x[:, :-1].double() @ w[:, :-1].double().T, right),
        "a row that is its neighbour's": (torch.cat([right[1:2], right[1:]]), right),
        "the norm's epsilon of 1e-5": (norm_with(x, 1e-5), rms_norm(x)),
        "RMS norm for LayerNorm": (rms_norm(x + 0.01), layer_norm(x + 0.01)),
        "GELU by erf": (F.gelu(right), F.gelu(right, approximate="tanh")),
        "RoPE's frequencies in bfloat16": (rotated(right, bf16_frequencies), rotated(right, frequencies)),
        "a scale of 1 / sqrt(head_dim + 1)": (right / math.sqrt(N + 1), right / math.sqrt(N)),
    }


@pytest.mark.parametrize("name", mistakes())
def test_no_mistake_is_within_the_bound_of_float32(name: str) -> None:
    wrong, right = mistakes()[name]
    assert rel_l2(wrong, right) > 2 * LOOSEST[torch.float32]


def bfloat16_mistakes() -> dict[str, tuple[Tensor, Tensor]]:
    x, w = randn(ROWS, K, dtype=torch.bfloat16), weight(N, K, torch.bfloat16)
    right = x.double() @ w.double().T
    halves = torch.zeros(ROWS, N, dtype=torch.bfloat16)
    for k in range(K):
        halves += x[:, k : k + 1] * w[:, k]
    return {
        "a bfloat16 accumulator": (halves, right),
        "the last of 600 products left out": (x[:, :-1].double() @ w[:, :-1].double().T, right),
        "a row that is its neighbour's": (torch.cat([right[1:2], right[1:]]), right),
        "operands of 8 bits": (x.to(torch.float8_e4m3fn).double() @ w.double().T, right),
    }


@pytest.mark.parametrize("name", bfloat16_mistakes())
def test_no_mistake_is_within_the_bound_of_bfloat16(name: str) -> None:
    wrong, right = bfloat16_mistakes()[name]
    assert rel_l2(wrong, right) > 1.5 * LOOSEST[torch.bfloat16]


def test_the_worst_order_of_a_sum_is_within_the_bounds() -> None:
    """4.4e-7 in float32: about u sqrt(K) / 3, with u = 2^-24. And one rounding to bfloat16 is 1.7e-3."""
    x, w = randn(ROWS, K), weight(N, K)
    total = torch.zeros(ROWS, N)
    for k in range(K):
        total += x[:, k : k + 1] * w[:, k]
    right = x.double() @ w.double().T
    assert 1e-7 < rel_l2(total, right) < 0.5 * op_checks.BOUND[torch.float32]
    assert 1e-3 < rel_l2(total.bfloat16(), right) < 0.5 * op_checks.BOUND[torch.bfloat16]

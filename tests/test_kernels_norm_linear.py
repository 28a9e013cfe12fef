"""Norm and linear as one op: meanings and costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from op_checks import check, randn, unset, weight
from pi0_engine.engine.plan import rope_table
from pi0_engine.kernels.norm_linear import layernorm_linear, rmsnorm_geglu, rmsnorm_linear_euler, rmsnorm_qkv_rope
from pi0_engine.kernels.registry import REGISTRY, Cost


def layer_norm(x: Tensor) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x.double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed if scale is None or shift is None else normed * scale.double() + shift.double()


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def modulation(adarms: bool, width: int) -> tuple[Tensor | None, Tensor | None]:
    return (1 + 0.3 * randn(width), 0.3 * randn(width)) if adarms else (None, None)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_layernorm_linear(activation: str | None, dtype: torch.dtype) -> None:
    x, w, bias, out = 3 + 5 * randn(2, 5, 13), weight(7, 13, dtype), randn(7), unset(2, 5, 7, dtype=dtype)
    layernorm_linear(x, w, bias, activation, out=out)
    y = layer_norm(x) @ w.double().T + bias.double()
    check(out, gelu_tanh(y) if activation else y, dtype)


def test_norms_have_eps_1e_6() -> None:
    """At values of 1e-3 eps is as large as the mean square."""
    x, w = torch.tensor([[1e-3, -1e-3]]), torch.eye(2)
    out = unset(1, 2)
    layernorm_linear(x, w, torch.zeros(2), None, out=out)
    torch.testing.assert_close(out, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))
    actions = torch.zeros(1, 2)
    rmsnorm_linear_euler(x, w, torch.zeros(2), None, None, actions=actions)
    torch.testing.assert_close(actions, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))


@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("with_queries", [True, False])
def test_rmsnorm_qkv_rope(adarms: bool, kv_heads: int, with_queries: bool, dtype: torch.dtype) -> None:
    """Four query heads of 6; keys and values go into the middle of a larger cache."""
    heads, head_dim, positions = 4, 6, torch.tensor([[4, 5, 6], [0, 7, 8]])
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    x, (scale, shift) = randn(2, 3, 13), modulation(adarms, 13)
    w = weight((q_dim if with_queries else 0) + 2 * kv_dim, 13, dtype)
    q = unset(2, 3, q_dim, dtype=dtype) if with_queries else None
    cache_k, cache_v = unset(2, 5, kv_dim, dtype=dtype), unset(2, 5, kv_dim, dtype=dtype)
    table = rope_table(9, head_dim)
    rmsnorm_qkv_rope(x, w, scale, shift, table, positions, q=q, k=cache_k[:, 1:4], v=cache_v[:, 1:4])
    y = rms_norm(x, scale, shift) @ w.double().T
    if q is not None:
        check(q, rotated(y[..., :q_dim], positions, head_dim), dtype)
    check(cache_k[:, 1:4], rotated(y[..., -2 * kv_dim : -kv_dim], positions, head_dim), dtype)
    check(cache_v[:, 1:4], y[..., -kv_dim:], dtype)
    assert cache_k[:, [0, 4]].isnan().all() and cache_v[:, [0, 4]].isnan().all()


def rotated(x: Tensor, positions: Tensor, head_dim: int) -> Tensor:
    """Pair (i, i + head_dim / 2) of each head as a complex number, times exp(i * position / 10000^(2i / head_dim))."""
    first, second = x.unflatten(-1, (-1, 2, head_dim // 2)).unbind(-2)
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turned = torch.complex(first, second) * torch.exp(1j * positions[:, :, None, None] * frequency)
    return torch.stack([turned.real, turned.imag], dim=-2).flatten(2)


@pytest.mark.parametrize("adarms", [False, True])
def test_rmsnorm_geglu(adarms: bool, dtype: torch.dtype) -> None:
    x, w, (scale, shift) = randn(2, 5, 13), weight(14, 13, dtype), modulation(adarms, 13)
    out = unset(2, 5, 7, dtype=dtype)
    rmsnorm_geglu(x, w, scale, shift, out=out)
    normed, (gate, up) = rms_norm(x, scale, shift), w.double().chunk(2)
    check(out, gelu_tanh(normed @ gate.T) * (normed @ up.T), dtype)


@pytest.mark.parametrize("adarms", [False, True])
def test_rmsnorm_linear_euler(adarms: bool) -> None:
    """Always float32: this is the path by which the actions' precision leaves the network."""
    x, w, bias, (scale, shift), actions = (
        randn(2, 5, 13),
        weight(7, 13),
        randn(7),
        modulation(adarms, 13),
        randn(2, 5, 7),
    )
    expected = actions.double() + rms_norm(x, scale, shift) @ w.double().T + bias.double()
    rmsnorm_linear_euler(x, w, bias, scale, shift, actions=actions)
    check(actions, expected, torch.float32)


def test_costs() -> None:
    """Two times three rows of width 8; bfloat16 weights and outputs, float32 stream and modulation."""
    bf16, x, scale = torch.bfloat16, randn(2, 3, 8), randn(8)
    stream = 4 * 6 * 8

    cost = REGISTRY["layernorm_linear"].cost(x, weight(5, 8, bf16), randn(5), "gelu", out=unset(2, 3, 5, dtype=bf16))
    assert cost == Cost(flops=2 * 6 * 5 * 8, bytes=stream + 2 * 5 * 8 + 4 * 5 + 2 * 6 * 5)

    q, kv = unset(2, 3, 8, dtype=bf16), unset(2, 3, 4, dtype=bf16)
    positions, table = torch.zeros(2, 3, dtype=torch.int64), rope_table(9, 4)
    arguments = (x, weight(16, 8, bf16), scale, scale, table, positions)
    cost = REGISTRY["rmsnorm_qkv_rope"].cost(*arguments, q=q, k=kv, v=kv)
    rows_of_table = 6 * 4 * 4
    assert cost == Cost(2 * 6 * 16 * 8, stream + 2 * 16 * 8 + 2 * 4 * 8 + 2 * 6 * 16 + rows_of_table)

    cost = REGISTRY["rmsnorm_geglu"].cost(x, weight(10, 8, bf16), None, None, out=unset(2, 3, 5, dtype=bf16))
    assert cost == Cost(2 * 6 * 10 * 8, stream + 2 * 10 * 8 + 2 * 6 * 5)

    actions = unset(2, 3, 7)
    cost = REGISTRY["rmsnorm_linear_euler"].cost(x, weight(7, 8), randn(7), scale, scale, actions=actions)
    assert cost == Cost(2 * 6 * 7 * 8, stream + 4 * (7 * 8 + 7 + 8 + 8) + 2 * 4 * 6 * 7)

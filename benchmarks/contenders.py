"""What an op is measured against: the torch meaning, flash-attn, and the bare call of a library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.kernels.availability import UNAVAILABLE
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.registry import all_ops
from pi0_engine.kernels.stream import Stream
from pi0_engine.measuring.op_calls import OpCall


@dataclass(frozen=True)
class Contender:
    """An implementation to measure. ``library`` is the bare product or attention, without what the op adds to it."""

    name: str
    function: Callable[..., object]
    whole: bool = True


def contenders(call: OpCall, device: torch.device, launcher: Launcher | None) -> list[Contender]:
    """Every implementation that can run, ours first; then the torch meaning, and the bare library call.

    Without a launcher, as on a CPU, Triton is left out: what its interpreter takes says nothing.
    """
    op = all_ops()[call.op]
    names = [name for name in op.implementations if launcher is not None or name != "triton"]
    found = [Contender(name, op.load(name, launcher)) for name in names if UNAVAILABLE[name](device) is None]
    found.append(Contender("torch", op.meaning))
    library = _library_call(call)
    return found if library is None else [*found, Contender("library", library, whole=False)]


def _library_call(call: OpCall) -> Callable[..., object] | None:
    """cuBLAS's product or torch's attention on the op's own operands and nothing else: the usual yardstick."""
    if call.op == "vision_attention":
        return _bare_vision_attention
    if call.op == "prefix_attention":
        return _bare_prefix_attention
    if call.op == "rmsnorm_mlp_residual":
        return _bare_mlp
    return _bare_product if "weight" in call.arguments else None


def _bare_product(weight: Tensor, **others: Any) -> object:
    x = others.get("x", others.get("patches"))
    return F.linear(x.rounded if isinstance(x, Stream) and weight.dtype == x.rounded.dtype else _plain(x), weight)


def _plain(x: Tensor | Stream) -> Tensor:
    return x.x if isinstance(x, Stream) else x


def _bare_mlp(gate_up: Tensor, down: Tensor, **others: Any) -> object:
    both = F.linear(others["residual"].rounded, gate_up)
    return F.linear(both[:, : down.shape[1]], down)


def _bare_vision_attention(qkv: Tensor, num_heads: int, **_: Any) -> object:
    return F.scaled_dot_product_attention(*(p.unflatten(-1, (num_heads, -1)).transpose(1, 2) for p in qkv.chunk(3, -1)))


def _bare_prefix_attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int, **_: Any) -> object:
    heads = (tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*heads, enable_gqa=True)

"""One op problem on one device: verify an implementation, then time it with its weights cold."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import capture, l2_bytes, replay_times
from op_problems import COLD, Problem, tensors
from pi0_engine.kernels.availability import UNAVAILABLE
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.registry import OpFunction, nbytes
from pi0_engine.kernels.stream import Scratch, Stream

#: Relative L2 of each output against the meaning in float64: some roundings to the dtype.
AGREEMENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Calls in one captured graph: enough that its start does not count, few enough to capture quickly.
_CALLS = (16, 512)
#: Measured replays of that graph.
REPLAYS = 15


@dataclass(frozen=True)
class Contender:
    """An implementation to measure. ``library`` is the bare product or attention, without what the op adds to it."""

    name: str
    function: Callable[..., object]
    whole: bool = True


def contenders(problem: Problem, device: torch.device, launcher: Launcher | None) -> list[Contender]:
    """Every implementation that can run, ours first; then the torch meaning, and the bare library call."""
    found = [
        Contender(name, problem.op.load(name, launcher))
        for name in problem.op.implementations
        if UNAVAILABLE[name](device) is None
    ]
    found.append(Contender("torch", problem.op.meaning))
    library = _library_call(problem)
    return found if library is None else [*found, Contender("library", library, whole=False)]


def verify(problem: Problem, function: OpFunction, arguments: Mapping[str, Any]) -> float:
    """The largest relative L2 of any output against the meaning in float64.

    Raises:
        ValueError: an output that is not finite, or further off than its dtype's roundings explain.
    """
    with torch.inference_mode():
        exact, own = _copies(arguments, torch.float64), _copies(arguments, None)
        problem.op.meaning(**exact)
        function(**own)
        worst = 0.0
        computed_in = min((t.dtype for v in own.values() for t in tensors(v)), key=lambda d: (d.itemsize, str(d)))
        bound = AGREEMENT.get(computed_in, AGREEMENT[torch.float32])
        for name in problem.outputs:
            for actual, expected in zip(tensors(own[name]), tensors(exact[name]), strict=True):
                error = float((actual.double() - expected.double()).norm() / expected.double().norm())
                if not error <= bound:
                    raise ValueError(f"{name} is off by {error:.2e} (relative L2), expected <= {bound:.0e}")
                worst = max(worst, error)
    return worst


def cold_calls(contender: Contender, arguments: Mapping[str, Any], cache_bytes: int) -> list[Callable[[], None]]:
    """Calls that between them read so many copies of what is cold that no call finds its own in the cache."""
    pools: dict[str, list[Any]] = {}
    for name in COLD:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            copies = min(max(2, math.ceil(2 * cache_bytes / nbytes(value))), _CALLS[1])
            pools[name] = [value, *(value.clone() for _ in range(copies - 1))]
    count = max([_CALLS[0], *(len(pool) for pool in pools.values())])
    rounds = itertools.islice(zip(*(itertools.cycle(pool) for pool in pools.values()), strict=False), count)
    chosen = [dict(zip(pools, each, strict=True)) for each in rounds] if pools else [{}] * count
    return [functools.partial(contender.function, **{**arguments, **each}) for each in chosen]


class Timing:
    """A captured graph of :func:`cold_calls`; on a CPU, one call after the other.

    Attributes:
        calls: in one :meth:`run`.
    """

    def __init__(self, contender: Contender, arguments: Mapping[str, Any], device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        calls = cold_calls(contender, arguments, l2_bytes(device) if self.on_gpu else 0)
        self.calls = len(calls)
        self._eager = calls
        self._graph = capture(calls) if self.on_gpu else None

    def run(self) -> None:
        """All calls, and wait for them."""
        if self._graph is None:
            with torch.inference_mode():
                for call in self._eager:
                    call()
        else:
            self._graph.replay()
            torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Per call: the median over replays, by the GPU's events."""
        assert self._graph is not None, "a CPU has no events"
        return 1e3 * float(np.median(replay_times(self._graph.replay, REPLAYS))) / self.calls


def _copies(arguments: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    def copied(value: Any) -> Any:
        if isinstance(value, Stream):
            parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return Stream(**{name: copied(part) for name, part in parts.items()})
        if isinstance(value, Scratch) or not isinstance(value, Tensor):
            return value
        return value.to(dtype) if dtype and value.is_floating_point() else value.clone()

    return {name: copied(value) for name, value in arguments.items()}


def _library_call(problem: Problem) -> Callable[..., object] | None:
    """cuBLAS's product or torch's attention on the op's own operands and nothing else: the usual yardstick."""
    if problem.op.name == "vision_attention":
        return _bare_vision_attention
    if problem.op.name == "prefix_attention":
        return _bare_prefix_attention
    if problem.op.name == "rmsnorm_mlp_residual":
        return _bare_mlp
    return _bare_product if "weight" in problem.arguments else None


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

"""The project's reference as a baseline, as it is and under torch.compile, on inputs that are on the device already.

It computes what openpi computes: all camera slots and all padding, masked (816 prefix tokens for full-size π0),
attention spelled out. ``torch.compile`` gets it in the two pieces that openpi's loop leaves it: the prefix, and the
velocity of one flow step, which is called once per step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pi0_engine.inputs import ModelInputs
from pi0_engine.reference import layers as reference_layers
from pi0_engine.reference.layers import KVCache
from pi0_engine.reference.model import Pi0Reference, flow_times

_FREQUENCIES = reference_layers.inverse_frequencies


def _constant_frequencies(head_dim: int, device: torch.device) -> Tensor:
    return _FREQUENCIES(head_dim, device)


class Baseline:
    """Draws one chunk per call.

    Args:
        model: on its device.
        compiler: None runs the model as it is, "max-autotune" compiles for the GPU, "eager" only traces (for tests).
    """

    def __init__(self, model: Pi0Reference, compiler: str | None) -> None:
        self.model = model
        self.device = model.projector.weight.device
        self._compiled = compiler is not None
        self._prefix: Callable[..., tuple[Tensor, KVCache]] = self._whole_prefix
        self._velocity: Callable[..., Tensor] = model.velocity
        if compiler is not None:
            # Otherwise they would be computed on the CPU in every call, which keeps the rest out of a CUDA graph.
            layers: Any = reference_layers
            if layers.inverse_frequencies is _FREQUENCIES:
                layers.inverse_frequencies = torch.compiler.assume_constant_result(_constant_frequencies)
            how: dict[str, Any] = {"backend": "eager"} if compiler == "eager" else {"mode": compiler}
            self._prefix = torch.compile(self._whole_prefix, fullgraph=True, dynamic=False, **how)
            self._velocity = torch.compile(model.velocity, fullgraph=True, dynamic=False, **how)

    def prepare(self, inputs: ModelInputs, noise: Tensor, num_steps: int) -> Callable[[], Tensor]:
        """A function that computes actions float32 [B, H, A] on the device; inputs are uploaded here, once."""
        names = ("images", "image_masks", "tokens", "token_mask", "state")
        images, image_masks, tokens, token_mask, state = (
            torch.from_numpy(getattr(inputs, name)).to(self.device) for name in names
        )
        start = noise.to(self.device)
        steps = [(t.to(self.device).expand(len(start)).clone(), dt) for t, dt in flow_times(num_steps)]

        @torch.no_grad()
        def sample() -> Tensor:
            if self._compiled:
                torch.compiler.cudagraph_mark_step_begin()
            pad_mask, cache = self._prefix(images, image_masks, tokens, token_mask)
            x_t = start
            for times, dt in steps:
                x_t = x_t + dt * self._velocity(state, pad_mask, cache, x_t, times)
            return x_t

        return sample

    def _whole_prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, KVCache]:
        prefix, pad_mask = self.model.embed_prefix(images, image_masks, tokens, token_mask)
        return pad_mask, self.model.prefill(prefix, pad_mask)


def wall_times(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Milliseconds of each call until its result is there."""
    out = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        out.append(1e3 * (time.perf_counter() - started))
    return out


def compile_counters() -> dict[str, int]:
    """What torch.compile says it did: graphs compiled, graph breaks, CUDA graphs it left out."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }

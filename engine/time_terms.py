"""Everything in a flow step that depends on the flow time alone, computed once per number of steps.

π0: the time half of ``action_time_mlp_in``, a bias vector per step. π0.5: adaRMS scale, shift and gate of every layer
and step. Both: the step size dt, folded into the output projection.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.engine.weights import TensorSource

#: How many different step counts are kept before the oldest is recomputed.
_KEPT = 4


@dataclass(frozen=True)
class Modulation:
    """adaRMS of one norm in one step, float32 [W] each; ``scale`` is 1 + the raw scale. All None in π0."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class StepTerms:
    """What one flow step adds to the weights.

    ``embed_bias`` float32 [W]; ``input_norms`` and ``mlp_norms`` one :class:`Modulation` per layer; ``out`` [A, W] and
    ``out_bias`` [A] float32, the final norm (π0) and dt folded in.
    """

    embed_bias: Tensor
    input_norms: tuple[Modulation, ...]
    mlp_norms: tuple[Modulation, ...]
    final_norm: Modulation
    out: Tensor
    out_bias: Tensor


def flow_grid(num_steps: int) -> tuple[list[float], float]:
    """Times of the Euler steps, 1 down to about 1/num_steps, and dt; accumulated in float32 like openpi's."""
    dt, time, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    for _ in range(num_steps):
        times.append(float(time))
        time += dt
    return times, float(dt)


def time_embedding(times: list[float], width: int) -> Tensor:
    """float32 [steps, width]: sines, then cosines, periods 4e-3 to 4 in geometric steps (openpi pi0_pytorch.py).

    In float64 throughout: at a period of 4e-3 a float32 angle is wrong by 1e-4.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    angle = torch.tensor(times, dtype=torch.float64)[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


class TimeTerms:
    """Makes and keeps the :class:`StepTerms` of the step counts in use.

    They take a few kilobytes per step in π0 and 0.46 MB per step in full-size π0.5. The weights that only they need
    (π0.5's 37 adaRMS projections, 0.46 GB in float32) are read from the source when a new step count is asked for, and
    not kept.
    """

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self._source, self._config, self._device = source, source.config, device
        self._known: OrderedDict[int, tuple[StepTerms, ...]] = OrderedDict()

    def __call__(self, num_steps: int) -> tuple[StepTerms, ...]:
        """The terms of each of ``num_steps`` steps, in order."""
        if num_steps not in self._known:
            self._known[num_steps] = self._compute(num_steps)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(num_steps)
        return self._known[num_steps]

    def _compute(self, num_steps: int) -> tuple[StepTerms, ...]:
        times, dt = flow_grid(num_steps)
        out, out_bias = self._read("action_out_proj.weight") * dt, self._read("action_out_proj.bias") * dt
        # Where the source's tensors are: on the host, or nowhere ("meta") when only shapes are wanted.
        embedding = time_embedding(times, self._config.expert.width).to(out.device)
        depth = self._config.expert.depth
        if not self._config.is_pi05:
            out = out * (1.0 + self._read("expert.norm.weight"))
            plain = (Modulation(),) * depth
            biases = self._pi0_biases(embedding).to(self._device)
            out, out_bias = out.to(self._device), out_bias.to(self._device)
            return tuple(StepTerms(bias, plain, plain, Modulation(), out, out_bias) for bias in biases)
        cond = F.silu(self._linear("time_mlp_out", F.silu(self._linear("time_mlp_in", embedding))))
        inputs = [self._modulations(f"expert.layers.{i}.input_norm", cond) for i in range(depth)]
        mlps = [self._modulations(f"expert.layers.{i}.post_attention_norm", cond) for i in range(depth)]
        finals = self._modulations("expert.norm", cond)
        bias = self._read("action_in_proj.bias").to(self._device)
        out, out_bias = out.to(self._device), out_bias.to(self._device)
        return tuple(
            StepTerms(bias, tuple(m[s] for m in inputs), tuple(m[s] for m in mlps), finals[s], out, out_bias)
            for s in range(num_steps)
        )

    def _pi0_biases(self, embedding: Tensor) -> Tensor:
        """float32 [steps, W]: everything that enters the action-time MLP besides the actions themselves."""
        width = self._config.expert.width
        weight = self._read("action_time_mlp_in.weight").double()
        from_actions = weight[:, :width] @ self._read("action_in_proj.bias").double()
        from_time = embedding.double() @ weight[:, width:].T
        return (from_time + from_actions + self._read("action_time_mlp_in.bias").double()).float()

    def _modulations(self, norm: str, cond: Tensor) -> list[Modulation]:
        """One norm's modulation per step, from cond [steps, W]."""
        modulation = self._linear(f"{norm}.dense", cond)
        modulation[:, : cond.shape[1]] += 1.0
        rows = modulation.to(self._device).unflatten(-1, (3, -1))
        return [Modulation(*row.unbind(0)) for row in rows]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._read(f"{name}.weight"), self._read(f"{name}.bias"))

    def _read(self, name: str) -> Tensor:
        return self._source.tensor(name).float()

"""Everything in a network call that depends on the flow time alone, computed once per number of steps.

π0: the time half of ``action_time_mlp_in``, a bias vector per call. π0.5: adaRMS scale and gate of every layer and
call, and its shift times the linear layer behind it. Both: the step size dt, folded into the output projection.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.config import FlowTimes, SolverName
from pi0_engine.engine.solvers import Advance, network_calls
from pi0_engine.engine.weights import DecoderLayerWeights, TensorSource
from pi0_engine.rtc.guidance import guidance_weight

#: Rows of a packed weight that are widened to float32 at a time: 8 MB of a full-size expert.
_ROWS = 2048
#: How many different step counts are kept before the oldest is recomputed.
_KEPT = 4


@dataclass(frozen=True)
class Modulation:
    """adaRMS of one norm in one step, float32. All None in π0.

    ``scale`` [W] is 1 + the raw scale; ``bias`` [N] is the shift behind the linear layer that follows; ``gate`` [W].
    Where each token has a time of its own, all are tables [2, ...]: of the step's time, and of time 0.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None

    def beside(self, other: Modulation) -> Modulation:
        """Tables of this one and another."""

        def table(one: Tensor | None, two: Tensor | None) -> Tensor:
            assert one is not None and two is not None
            return torch.stack([one, two])

        return Modulation(table(self.scale, other.scale), table(self.bias, other.bias), table(self.gate, other.gate))


@dataclass(frozen=True)
class StepTerms:
    """What one network call adds to the weights: one per flow step, with the midpoint solver two.

    ``embed_bias`` float32 [W]; ``input_norms`` and ``mlp_norms`` one :class:`Modulation` per layer; ``out`` [A, W] and
    ``out_bias`` [A] float32, the final norm and dt folded in. ``time`` runs from 1 to 0, so ``dt``, the
    whole flow step's, is negative. ``advance`` says what becomes of the velocity; None in an Euler step.
    """

    time: float
    dt: float
    embed_bias: Tensor
    input_norms: tuple[Modulation, ...]
    mlp_norms: tuple[Modulation, ...]
    out: Tensor
    out_bias: Tensor
    advance: Advance | None = None

    def scale_after_layer(self, index: int) -> Tensor | None:
        """adaRMS scale of the norm that reads what layer ``index`` wrote; the final norm's is in ``out``."""
        return self.input_norms[index + 1].scale if index + 1 < len(self.input_norms) else None

    @property
    def guidance_weight(self) -> float:
        """How strongly real-time chunking pulls in this step, before it is bounded; infinite at time 1."""
        return guidance_weight(self.time)


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

    They take a few kilobytes per step in π0 and 1.2 MB per step in full-size π0.5. The weights that only they need
    (π0.5's 37 adaRMS projections, 0.46 GB in float32) are read from the source when a new step count is asked for, and
    not kept.
    """

    def __init__(
        self,
        source: TensorSource,
        layers: list[DecoderLayerWeights],
        device: torch.device,
        rounding: FlowTimes = "openpi",
        solver: SolverName = "euler",
    ) -> None:
        self._source, self._config, self._layers, self._device = source, source.config, layers, device
        self._rounding, self._solver = rounding, solver
        self._known: OrderedDict[tuple[int, bool], tuple[StepTerms, ...]] = OrderedDict()

    def __call__(self, num_steps: int, *, per_token: bool = False) -> tuple[StepTerms, ...]:
        """The terms of each network call of ``num_steps`` steps, in order; ``per_token`` asks for tables (π0.5)."""
        key = num_steps, per_token
        if key not in self._known:
            self._known[key] = self._compute(num_steps, per_token)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _compute(self, num_steps: int, per_token: bool) -> tuple[StepTerms, ...]:
        calls, dt = network_calls(self._solver, num_steps, self._rounding)
        times = [call.time for call in calls]
        out, out_bias = self._read("action_out_proj.weight") * dt, self._read("action_out_proj.bias") * dt
        # Where the source's tensors are: on the host, or nowhere ("meta") when only shapes are wanted.
        embedding = time_embedding(times, self._config.expert.width).to(out.device)
        depth = self._config.expert.depth
        if not self._config.is_pi05:
            assert not per_token, "π0's time is not in a norm"
            out = out * (1.0 + self._read("expert.norm.weight"))
            plain = (Modulation(),) * depth
            biases = self._pi0_biases(embedding).to(self._device)
            out, out_bias = out.to(self._device), out_bias.to(self._device)
            return tuple(
                StepTerms(call.time, dt, bias, plain, plain, out, out_bias, call.advance)
                for call, bias in zip(calls, biases, strict=True)
            )
        cond = self._condition(embedding)
        modulating = cond
        if per_token:  # time 0 goes along behind the last step
            clean = self._condition(time_embedding([0.0], self._config.expert.width).to(out.device))
            modulating = torch.cat([cond, clean])
        inputs: list[list[Modulation]] = []
        mlps: list[list[Modulation]] = []
        for index, layer in enumerate(self._layers):
            assert layer.gate_up is not None
            name = f"expert.layers.{index}"
            for norms, norm, weight in (
                (inputs, "input_norm", layer.qkv),
                (mlps, "post_attention_norm", layer.gate_up),
            ):
                found = self._modulations(f"{name}.{norm}", modulating, weight)
                norms.append([step.beside(found[-1]) for step in found[:-1]] if per_token else found)
        scale, shift, _ = self._linear("expert.norm.dense", cond).chunk(3, dim=-1)
        outs = (out * (1.0 + scale)[:, None, :]).to(self._device)
        out_biases = (F.linear(shift, out) + out_bias).to(self._device)
        bias = self._read("action_in_proj.bias").to(self._device)
        return tuple(
            StepTerms(
                call.time,
                dt,
                bias,
                tuple(m[s] for m in inputs),
                tuple(m[s] for m in mlps),
                outs[s],
                out_biases[s],
                call.advance,
            )
            for s, call in enumerate(calls)
        )

    def _pi0_biases(self, embedding: Tensor) -> Tensor:
        """float32 [steps, W]: everything that enters the action-time MLP besides the actions themselves."""
        width = self._config.expert.width
        weight = self._read("action_time_mlp_in.weight").double()
        from_actions = weight[:, :width] @ self._read("action_in_proj.bias").double()
        from_time = embedding.double() @ weight[:, width:].T
        return (from_time + from_actions + self._read("action_time_mlp_in.bias").double()).float()

    def _modulations(self, norm: str, cond: Tensor, weight: Tensor) -> list[Modulation]:
        """One norm's modulation per step, from cond [steps, W]; ``weight`` [N, W] is the linear layer behind it."""
        scale, shift, gate = self._linear(f"{norm}.dense", cond).to(self._device).chunk(3, dim=-1)
        bias = torch.cat([F.linear(shift, rows.float()) for rows in weight.split(_ROWS)], dim=-1)
        return [Modulation(*terms) for terms in zip(1.0 + scale, bias, gate.contiguous(), strict=True)]

    def _condition(self, embedding: Tensor) -> Tensor:
        """What adaRMS is computed from: time embeddings [steps, W] -> [steps, W]."""
        return F.silu(self._linear("time_mlp_out", F.silu(self._linear("time_mlp_in", embedding))))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._read(f"{name}.weight"), self._read(f"{name}.bias"))

    def _read(self, name: str) -> Tensor:
        return self._source.tensor(name).float()

"""Stage 4: integrate the flow from noise (t = 1) to actions (t = 0) with Euler steps, in place on ``actions``."""

from __future__ import annotations

from collections.abc import Sequence

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.expert import embed_actions, expert_layer
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.time_terms import StepTerms
from pi0_engine.engine.weights import ActionWeights, DecoderLayerWeights
from pi0_engine.kernels.registry import Ops


def integrate(
    ops: Ops,
    config: GemmaConfig,
    action: ActionWeights,
    layers: list[DecoderLayerWeights],
    steps: Sequence[StepTerms],
    space: Workspace,
) -> None:
    """``actions`` [N, H, A]: noise in, the action chunk out."""
    for terms in steps:
        flow_step(ops, config, action, layers, terms, space)


def flow_step(
    ops: Ops,
    config: GemmaConfig,
    action: ActionWeights,
    layers: list[DecoderLayerWeights],
    terms: StepTerms,
    space: Workspace,
) -> None:
    """x <- x + dt * velocity(x, t)."""
    embed_actions(ops, action, terms, space)
    for index, layer in enumerate(layers):
        expert_layer(ops, config, index, layer, terms, space)
    final = terms.final_norm
    ops.rmsnorm_linear_euler(
        space["suffix_x"], terms.out, terms.out_bias, final.scale, final.shift, actions=space["actions"]
    )

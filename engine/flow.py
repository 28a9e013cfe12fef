"""Stage 3: integrate the flow from noise (t = 1) to actions (t = 0) with Euler steps, in place on ``actions``."""

from __future__ import annotations

from collections.abc import Sequence

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.expert import embed_actions, embed_state, expert_layer
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
    """``actions`` [N * H, A]: noise in, the action chunks out."""
    if space.plan.state_rows:
        embed_state(ops, action, space)
    for number, terms in enumerate(steps):
        rows = space.plan.suffix_rows if number == 0 else space.plan.action_rows
        with ops.range(f"flow step {number}"):
            flow_step(ops, config, action, layers, terms, space, rows)


def flow_step(
    ops: Ops,
    config: GemmaConfig,
    action: ActionWeights,
    layers: list[DecoderLayerWeights],
    terms: StepTerms,
    space: Workspace,
    rows: int,
) -> None:
    """x <- x + dt * velocity(x, t), guided (``guidance.py``); the expert runs over the suffix's first ``rows`` rows."""
    embed_actions(ops, action, terms, space)
    for index, layer in enumerate(layers):
        with ops.range(f"expert layer {index}"):
            expert_layer(ops, config, index, layer, terms, space, rows)
    x = space.suffix[: space.plan.action_rows]
    ops.rmsnorm_linear_euler(
        x,
        terms.out,
        terms.out_bias,
        space["previous"],
        space["prefix_weights"],
        space["max_weight"],
        terms.guidance_weight,
        terms.time,
        terms.dt,
        space.time_index,
        actions=space["actions"],
        scratch=space.scratch,
    )

"""Stage 3: integrate the flow from noise (t = 1) to actions (t = 0) in place on ``actions`` (solvers.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.expert import embed_actions, embed_state, expert_layer
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.solvers import CALLS_PER_STEP, Advance
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
    """``actions`` [N * H, A]: noise in, the action chunks out. ``steps`` has the terms of each network call."""
    if space.plan.state_rows:
        embed_state(ops, action, space)
    for number, terms in enumerate(steps):
        with ops.range(f"flow step {number // CALLS_PER_STEP[space.plan.solver]}"):
            network_call(ops, config, action, layers, terms, space, first=number == 0)


def network_call(
    ops: Ops,
    config: GemmaConfig,
    action: ActionWeights,
    layers: list[DecoderLayerWeights],
    terms: StepTerms,
    space: Workspace,
    *,
    first: bool,
) -> None:
    """The velocity at ``actions`` and what follows from it; the state token goes along in the ``first`` call."""
    rows = space.plan.suffix_rows if first else space.plan.action_rows
    embed_actions(ops, action, terms, space)
    for index, layer in enumerate(layers):
        with ops.range(f"expert layer {index}"):
            expert_layer(ops, config, index, layer, terms, space, rows)
    if terms.advance is None:
        euler_step(ops, terms, space)
    else:
        advance(ops, terms, terms.advance, space, space["actions"] if first else space["base"])


def euler_step(ops: Ops, terms: StepTerms, space: Workspace) -> None:
    """x <- x + dt * velocity(x, t), guided (``rtc/guidance.py``)."""
    ops.rmsnorm_linear_euler(
        space.suffix[: space.plan.action_rows],
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


def advance(ops: Ops, terms: StepTerms, way: Advance, space: Workspace, start: Tensor) -> None:
    """A call of a solver of second order: ``base`` and ``actions`` move on from ``start`` (``solvers.py``)."""
    ops.rmsnorm_linear_second_order(
        space.suffix[: space.plan.action_rows],
        terms.out,
        terms.out_bias,
        start,
        way.base,
        way.actions,
        space.time_index,
        base=space["base"],
        actions=space["actions"],
        scratch=space.scratch,
    )

"""The action expert over the suffix of one flow step: action tokens and, in the first step, π0's state token.

The state token sees the prefix and itself but no action, so nothing about it changes from step to step: it goes along
in the first step, and its keys and values stay where they are for the others.
"""

from __future__ import annotations

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.time_terms import StepTerms
from pi0_engine.engine.weights import ActionWeights, DecoderLayerWeights
from pi0_engine.kernels.registry import Ops


def embed_state(ops: Ops, action: ActionWeights, space: Workspace) -> None:
    """``state`` [B, A] -> the last rows of the suffix stream."""
    out = space.suffix[space.plan.action_rows :]
    ops.linear(space["state"], action.state, action.state_bias, None, None, out=out, scratch=space.scratch)


def embed_actions(ops: Ops, action: ActionWeights, terms: StepTerms, space: Workspace) -> None:
    """Noisy ``actions`` [N * H, A] -> the first rows of the suffix stream; the flow time is in the bias."""
    out, scratch, next_scale = space.suffix[: space.plan.action_rows], space.scratch, terms.input_norms[0].scale
    actions, hidden = space["actions"], space["action_hidden"]
    if action.mlp_out is None:  # π0.5: the time enters through adaRMS instead
        index = space.time_index
        ops.linear(actions, action.embed, terms.embed_bias, None, next_scale, index, out=out, scratch=scratch)
        return
    ops.linear(actions, action.embed, terms.embed_bias, "silu", None, out=hidden, scratch=scratch)
    ops.linear(hidden, action.mlp_out, action.mlp_out_bias, None, next_scale, out=out, scratch=scratch)


def expert_layer(
    ops: Ops, config: GemmaConfig, index: int, w: DecoderLayerWeights, terms: StepTerms, space: Workspace, rows: int
) -> None:
    """One layer over the first ``rows`` rows of the suffix stream, in place: four ops."""
    x, scratch, index_of_time = space.suffix[:rows], space.scratch, space.time_index
    q, mixed, hidden = (space[name][:rows] for name in ("suffix_q", "suffix_mixed", "suffix_hidden"))
    k, v = space["suffix_k"][index], space["suffix_v"][index]
    norm1, norm2, after = terms.input_norms[index], terms.mlp_norms[index], terms.scale_after_layer(index)
    ops.rmsnorm_qkv_rope(
        x,
        w.qkv,
        norm1.scale,
        norm1.bias,
        space.rope_table,
        space.suffix_positions[:rows],
        index_of_time,
        q=q,
        k=k[:rows],
        v=v[:rows],
        scratch=scratch,
    )
    per_observation = (space.plan.batch, -1)
    prefix_k, prefix_v = (space[name][index].unflatten(0, per_observation) for name in ("cache_k", "cache_v"))
    ops.suffix_attention(
        q,
        prefix_k,
        prefix_v,
        k,
        v,
        space.masked_lengths,
        space.plan.horizon,
        space.plan.chunks,
        config.head_dim,
        w.gate_up,
        out=mixed,
        scratch=scratch,
    )
    ops.linear_residual(mixed, w.o, None, norm1.gate, norm2.scale, index_of_time, residual=x, scratch=scratch)
    ops.rmsnorm_mlp_residual(
        w.gate_up,
        w.down,
        norm2.scale,
        norm2.bias,
        norm2.gate,
        after,
        index_of_time,
        hidden=hidden,
        residual=x,
        scratch=scratch,
    )

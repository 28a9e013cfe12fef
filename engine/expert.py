"""Stages 3 and 4, one pass each: the action expert over the state token, and over the action tokens of a flow step."""

from __future__ import annotations

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.time_terms import StepTerms
from pi0_engine.engine.weights import ActionWeights, DecoderLayerWeights
from pi0_engine.kernels.registry import Ops


def encode_state(
    ops: Ops, config: GemmaConfig, action: ActionWeights, layers: list[DecoderLayerWeights], space: Workspace
) -> None:
    """Run π0's state token once and leave its keys and values in row 0 of the cache.

    It sees the prefix and itself but no action, so nothing about it changes from flow step to flow step. Its last
    layer stops at keys and values, as the prefix's does.
    """
    x, q, mixed, hidden = (space[name] for name in ("state_x", "state_q", "state_mixed", "state_hidden"))
    ops.linear(space["state"], action.state, action.state_bias, None, out=x)
    lengths = space.masked(space.cache_lengths)
    for index, w in enumerate(layers):
        k, v = space["cache_k"][index], space["cache_v"][index]
        ops.rmsnorm_qkv_rope(x, w.qkv, None, None, space.rope_table, space.state_positions, q=q, k=k[:, :1], v=v[:, :1])
        if index == len(layers) - 1:
            return
        ops.prefix_attention(q, k, v, lengths, config.head_dim, out=mixed)
        ops.linear_residual(mixed, w.o, None, None, residual=x)
        ops.rmsnorm_geglu(x, w.gate_up, None, None, out=hidden)
        ops.linear_residual(hidden, w.down, None, None, residual=x)


def embed_actions(ops: Ops, action: ActionWeights, terms: StepTerms, space: Workspace) -> None:
    """Noisy ``actions`` [N, H, A] -> suffix tokens ``suffix_x`` [N, H, W]; the flow time is in the bias."""
    if action.mlp_out is None:  # π0.5: the time enters through adaRMS instead
        ops.linear(space["actions"], action.embed, terms.embed_bias, None, out=space["suffix_x"])
        return
    ops.linear(space["actions"], action.embed, terms.embed_bias, "silu", out=space["action_hidden"])
    ops.linear(space["action_hidden"], action.mlp_out, action.mlp_out_bias, None, out=space["suffix_x"])


def expert_layer(
    ops: Ops, config: GemmaConfig, index: int, w: DecoderLayerWeights, terms: StepTerms, space: Workspace
) -> None:
    """One layer over the action tokens, in place on ``suffix_x`` [N, H, W]: five ops."""
    x, q, mixed, hidden = (space[name] for name in ("suffix_x", "suffix_q", "suffix_mixed", "suffix_hidden"))
    k, v, norm1, norm2 = space["suffix_k"], space["suffix_v"], terms.input_norms[index], terms.mlp_norms[index]
    ops.rmsnorm_qkv_rope(x, w.qkv, norm1.scale, norm1.shift, space.rope_table, space.suffix_positions, q=q, k=k, v=v)
    prefix_k, prefix_v = space["cache_k"][index], space["cache_v"][index]
    lengths = space.masked(space.cache_lengths)
    ops.suffix_attention(q, prefix_k, prefix_v, k, v, lengths, config.head_dim, out=mixed)
    ops.linear_residual(mixed, w.o, None, norm1.gate, residual=x)
    ops.rmsnorm_geglu(x, w.gate_up, norm2.scale, norm2.shift, out=hidden)
    ops.linear_residual(hidden, w.down, None, norm2.gate, residual=x)

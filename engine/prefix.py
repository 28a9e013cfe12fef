"""Stage 2: the language model over images and prompt -> keys and values of every layer.

The prefix's output is never used in sampling, so the last layer computes its keys and values and stops.
"""

from __future__ import annotations

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.weights import DecoderLayerWeights
from pi0_engine.kernels.registry import Ops


def prefill(ops: Ops, config: GemmaConfig, layers: list[DecoderLayerWeights], space: Workspace) -> None:
    """Put ``prompt`` behind the images of the prefix stream (overwritten), fill ``cache_k`` and ``cache_v``."""
    embed_prompts(ops, space)
    for index, layer in enumerate(layers):
        with ops.range(f"prefix layer {index}"):
            prefix_layer(ops, config, index, layer, space)


def embed_prompts(ops: Ops, space: Workspace) -> None:
    """The rows of each observation that follow its images."""
    rows = space.plan.prefix
    for b, start in enumerate(space.plan.image_rows):
        if start < rows:
            own = space.prefix[b * rows + start : (b + 1) * rows]
            ops.embed_prompt(space["prompt"][b], start, space.lengths[b : b + 1], out=own)


def prefix_layer(ops: Ops, config: GemmaConfig, index: int, w: DecoderLayerWeights, space: Workspace) -> None:
    """One language-model layer: five ops; the last layer only its first."""
    x, scratch = space.prefix, space.scratch
    q, mixed, hidden = (space[name] for name in ("prefix_q", "prefix_mixed", "prefix_hidden"))
    k, v = space["cache_k"][index], space["cache_v"][index]
    last = w.o is None
    ops.rmsnorm_qkv_rope(
        x,
        w.qkv,
        None,
        None,
        space.rope_table,
        space.prefix_positions,
        q=None if last else q,
        k=k,
        v=v,
        scratch=scratch,
    )
    if last:
        return
    per_observation = (space.plan.batch, -1)
    ops.prefix_attention(
        *(tensor.unflatten(0, per_observation) for tensor in (q, k, v)),
        space.masked_lengths,
        config.head_dim,
        out=mixed.unflatten(0, per_observation),
        scratch=scratch,
    )
    ops.linear_residual(mixed, w.o, None, None, None, residual=x, scratch=scratch)
    ops.rmsnorm_geglu(x, w.gate_up, None, None, out=hidden, scratch=scratch)
    ops.linear_residual(hidden, w.down, None, None, None, residual=x, scratch=scratch)

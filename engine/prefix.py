"""Stage 2: the language model over images and prompt -> keys and values of every layer.

The prefix's output is never used in sampling, so the last layer computes its keys and values and stops.
"""

from __future__ import annotations

from pi0_engine.config import GemmaConfig
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.weights import DecoderLayerWeights
from pi0_engine.kernels.registry import Ops


def prefill(ops: Ops, config: GemmaConfig, layers: list[DecoderLayerWeights], space: Workspace) -> None:
    """Read ``prefix_x`` [B, P, width] (overwritten), fill ``cache_k`` and ``cache_v`` behind the state row."""
    for index, layer in enumerate(layers):
        prefix_layer(ops, config, index, layer, space)


def prefix_layer(ops: Ops, config: GemmaConfig, index: int, w: DecoderLayerWeights, space: Workspace) -> None:
    """One language-model layer: five ops; the last layer only its first."""
    x, q, mixed, hidden = (space[name] for name in ("prefix_x", "prefix_q", "prefix_mixed", "prefix_hidden"))
    k, v = (space[name][index, :, space.state_rows :] for name in ("cache_k", "cache_v"))
    read_queries = w.o is not None
    ops.rmsnorm_qkv_rope(
        x, w.qkv, None, None, space.rope_table, space.prefix_positions, q=q if read_queries else None, k=k, v=v
    )
    if not read_queries:
        return
    ops.prefix_attention(q, k, v, space.masked(space.lengths), config.head_dim, out=mixed)
    ops.linear_residual(mixed, w.o, None, None, residual=x)
    ops.rmsnorm_geglu(x, w.gate_up, None, None, out=hidden)
    ops.linear_residual(hidden, w.down, None, None, residual=x)

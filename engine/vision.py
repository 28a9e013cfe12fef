"""Stage 1: camera images -> image tokens at the head of the prefix (SigLIP and the projector)."""

from __future__ import annotations

from pi0_engine.config import SiglipConfig
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.weights import VisionLayerWeights, VisionWeights
from pi0_engine.kernels.registry import Ops


def embed_images(ops: Ops, config: SiglipConfig, weights: VisionWeights, space: Workspace) -> None:
    """Read ``images`` [N, S, S, 3], write the first rows of ``prefix_x`` [B, P, width]."""
    if space.plan.images == 0:
        return
    x = space["vision_x"]
    ops.patch_embed(space["images"], weights.patch, weights.position, out=x)
    for layer in weights.layers:
        vision_layer(ops, config, layer, space)
    first = 0
    for row, views in zip(space["prefix_x"], space.plan.views, strict=True):
        if views == 0:
            continue
        tokens = row[: views * config.num_patches].view(views, config.num_patches, -1)
        ops.layernorm_linear(x[first : first + views], weights.projector, weights.projector_bias, None, out=tokens)
        first += views


def vision_layer(ops: Ops, config: SiglipConfig, w: VisionLayerWeights, space: Workspace) -> None:
    """One encoder layer, in place on ``vision_x`` [N, patches, width]: five ops."""
    x, qkv, mixed, hidden = (space[name] for name in ("vision_x", "vision_qkv", "vision_mixed", "vision_hidden"))
    ops.layernorm_linear(x, w.qkv, w.qkv_bias, None, out=qkv)
    ops.vision_attention(qkv, config.num_heads, out=mixed)
    ops.linear_residual(mixed, w.out, w.out_bias, None, residual=x)
    ops.layernorm_linear(x, w.fc1, w.fc1_bias, "gelu", out=hidden)
    ops.linear_residual(hidden, w.fc2, w.fc2_bias, None, residual=x)

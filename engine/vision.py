"""Stage 1: camera images -> image tokens at the head of the prefix (SigLIP and the projector)."""

from __future__ import annotations

from pi0_engine.config import SiglipConfig
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.weights import VisionLayerWeights, VisionWeights
from pi0_engine.kernels.registry import Ops


def embed_images(ops: Ops, config: SiglipConfig, weights: VisionWeights, space: Workspace) -> None:
    """Read ``patches`` [N * n, p * p * 3], or packed frames, begin the prefix stream [B * P, width] with the images."""
    if space.plan.images == 0:
        return
    x, patches = space.vision, config.num_patches
    if space.plan.frames:
        per_image = space["patches"].unflatten(0, (-1, patches))
        ops.frames_to_patches(space["pixels"], space["table"], patches=per_image)
    ops.patch_embed(space["patches"], weights.patch, weights.position, out=x, scratch=space.scratch)
    for index, layer in enumerate(weights.layers):
        with ops.range(f"vision layer {index}"):
            vision_layer(ops, config, layer, space)
    first = 0
    for row, views in enumerate(space.plan.views):
        if views == 0:
            continue
        images, start = x[first : first + views * patches], row * space.plan.prefix
        tokens = space.prefix[start : start + views * patches]
        ops.layernorm_linear(images, weights.projector, weights.projector_bias, None, out=tokens, scratch=space.scratch)
        first += views * patches


def vision_layer(ops: Ops, config: SiglipConfig, w: VisionLayerWeights, space: Workspace) -> None:
    """One encoder layer, in place on the vision stream [N * n, width]: five ops."""
    x, scratch = space.vision, space.scratch
    qkv, mixed, hidden = (space[name] for name in ("vision_qkv", "vision_mixed", "vision_hidden"))
    per_image = (-1, config.num_patches)
    ops.layernorm_linear(x, w.qkv, w.qkv_bias, None, out=qkv, scratch=scratch)
    ops.vision_attention(
        qkv.unflatten(0, per_image), config.num_heads, out=mixed.unflatten(0, per_image), scratch=scratch
    )
    ops.linear_residual(mixed, w.out, w.out_bias, None, None, residual=x, scratch=scratch)
    ops.layernorm_linear(x, w.fc1, w.fc1_bias, "gelu", out=hidden, scratch=scratch)
    ops.linear_residual(hidden, w.fc2, w.fc2_bias, None, None, residual=x, scratch=scratch)

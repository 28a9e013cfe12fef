"""Images to patch tokens."""

from __future__ import annotations

from torch import Tensor

from pi0_engine.kernels.gemm import gemm
from pi0_engine.kernels.registry import Cost, nbytes, op


def _patch_embed_cost(images: Tensor, weight: Tensor, position: Tensor, *, out: Tensor) -> Cost:
    rows = out.numel() // out.shape[-1]
    return Cost(2.0 * rows * weight.numel(), nbytes(images, weight, position, out))


@op(cost=_patch_embed_cost)
def patch_embed(images: Tensor, weight: Tensor, position: Tensor, *, out: Tensor) -> None:
    """Cut images into patches, project each, add its position embedding.

    images float32 [N, S, S, 3]; weight [W, p * p * 3], a patch's pixels row by row with the channel fastest; position
    [patches, W] with the projection's bias already added; out [N, patches, W], patches row-major.
    """
    count, size, _, channels = images.shape
    patch = round((weight.shape[1] // channels) ** 0.5)
    grid = size // patch
    tiles = images.view(count, grid, patch, grid, patch, channels).permute(0, 1, 3, 2, 4, 5)
    out.copy_(gemm(tiles.reshape(count, grid * grid, -1), weight) + position)

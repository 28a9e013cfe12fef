"""patch_embed: meaning and cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from op_checks import check, randn, unset, weight
from pi0_engine.kernels.patch import patch_embed
from pi0_engine.kernels.registry import REGISTRY, Cost


@pytest.mark.parametrize(("count", "size", "patch"), [(1, 14, 14), (2, 28, 14), (3, 15, 5), (1, 224, 14)])
def test_patch_embed_is_a_strided_convolution(count: int, size: int, patch: int) -> None:
    images, w, position = randn(count, size, size, 3), weight(7, 3 * patch**2), randn((size // patch) ** 2, 7)
    out = unset(count, (size // patch) ** 2, 7)
    patch_embed(images, w, position, out=out)
    kernel = w.view(7, patch, patch, 3).permute(0, 3, 1, 2)
    expected = F.conv2d(images.permute(0, 3, 1, 2).double(), kernel.double(), stride=patch)
    check(out, expected.flatten(2).transpose(1, 2) + position.double(), torch.float32)


def test_patches_are_row_major_and_pixels_too() -> None:
    """A weight that picks one pixel of a patch shows where each comes from."""
    images = torch.arange(16.0).view(1, 4, 4, 1).expand(1, 4, 4, 3).contiguous()
    w = torch.zeros(1, 12)
    w[0, 3] = 1.0  # second pixel of a patch's first row
    out = unset(1, 4, 1)
    patch_embed(images, w, torch.zeros(4, 1), out=out)
    assert out.flatten().tolist() == [1, 3, 9, 11]


def test_cost() -> None:
    images, w, position, out = unset(2, 28, 28, 3), unset(7, 588), unset(4, 7), unset(2, 4, 7)
    cost = REGISTRY["patch_embed"].cost(images, w, position, out=out)
    assert cost == Cost(flops=2 * 8 * 588 * 7, bytes=4 * (2 * 28 * 28 * 3 + 7 * 588 + 4 * 7 + 8 * 7))

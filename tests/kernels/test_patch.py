"""patch_embed, embed_prompt: meaning and cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_engine.engine.session import cut_patches
from pi0_engine.kernels.patch import embed_prompt, patch_embed
from pi0_engine.kernels.registry import REGISTRY, Cost
from tests.support.op_checks import SCRATCH, check, check_stream, randn, unset, unset_stream, weight

BF16 = torch.bfloat16


@pytest.mark.parametrize("width", [7, 150])
@pytest.mark.parametrize(("count", "size", "patch"), [(1, 14, 14), (2, 28, 14), (3, 15, 5), (1, 224, 14)])
def test_patch_embed_is_a_strided_convolution(count: int, size: int, patch: int, width: int) -> None:
    """Pixels and weights float32, whatever the stream is rounded to."""
    images, patches = randn(count, size, size, 3), (size // patch) ** 2
    w, position = weight(width, 3 * patch**2), randn(patches, width)
    out = unset_stream(count * patches, width, BF16, sums=True)
    patch_embed(cut(images, patch), w, position, out=out, scratch=SCRATCH)
    kernel = w.view(width, patch, patch, 3).permute(0, 3, 1, 2)
    expected = F.conv2d(images.permute(0, 3, 1, 2).double(), kernel.double(), stride=patch)
    expected = expected.flatten(2).transpose(1, 2) + position.double()
    check_stream(out, expected.flatten(0, 1), None, BF16)
    check(out.x, expected.flatten(0, 1), torch.float32)


def test_patches_are_row_major_and_pixels_too() -> None:
    """A weight that picks one number of a patch shows where each comes from."""
    rows = torch.arange(16.0).view(1, 4, 4, 1).expand(1, 4, 4, 3)
    images = rows + torch.tensor([0.0, 0.25, 0.5])
    for number, expected in ((3, [1, 3, 9, 11]), (0, [0, 2, 8, 10]), (2, [0.5, 2.5, 8.5, 10.5]), (6, [4, 6, 12, 14])):
        w, out = torch.zeros(1, 12), unset_stream(4, 1, sums=True)
        w[0, number] = 1.0  # 0: first pixel, first channel; 3: second pixel of a patch's first row; 6: second row
        patch_embed(cut(images, 2), w, torch.zeros(4, 1), out=out, scratch=SCRATCH)
        assert out.x.flatten().tolist() == expected


def test_strided_images_are_cut_alike() -> None:
    images = randn(2, 28, 28, 3)
    strided = images.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(cut(images, 14), cut(strided, 14))


def cut(images: Tensor, patch: int) -> Tensor:
    """Patches of all images, stacked as the engine stacks them."""
    count, size, _, _ = images.shape
    out = unset(count, (size // patch) ** 2, 3 * patch**2)
    for image, patches in zip(images, out, strict=True):
        cut_patches(image, patch, out=patches)
    return out.flatten(0, 1)


@pytest.mark.parametrize("width", [7, 150])
@pytest.mark.parametrize("start", [0, 8])
@pytest.mark.parametrize("valid", [0, 1, 3, 5])
def test_embed_prompt(start: int, valid: int, width: int, dtype: torch.dtype) -> None:
    """Five rows behind ``start`` image tokens; zeros behind the last valid one, whatever the buffer holds there."""
    prompt, whole = randn(6, width), unset_stream(7, width, dtype)
    prompt[valid:] = torch.nan
    embed_prompt(prompt, start, torch.tensor([start + valid], dtype=torch.int32), out=whole[1:6])
    expected = torch.zeros(5, width, dtype=torch.float64)
    expected[:valid] = prompt[:valid].double()
    assert torch.equal(whole[1:6].x.double(), expected)
    if valid:
        check_stream(whole[1:6], expected, None, dtype)
    assert all((part[1 + valid : 6] == 0).all() for part in whole.tensors.values())
    assert all(part[[0, 6]].isnan().all() for part in whole.tensors.values())


def test_costs() -> None:
    patches, w, position = unset(8, 588), unset(7, 588), unset(4, 7)
    cost = REGISTRY["patch_embed"].cost(patches, w, position, out=unset_stream(8, 7, BF16, sums=True), scratch=SCRATCH)
    written = 4 * 8 * 7 + 2 * 8 * 7 + 4 * 8 + 4 * 8
    assert cost == Cost(flops=2 * 8 * 588 * 7, bytes=4 * (8 * 588 + 7 * 588 + 4 * 7) + written)

    length = torch.zeros(1, dtype=torch.int32)
    cost = REGISTRY["embed_prompt"].cost(unset(6, 7), 8, length, out=unset_stream(5, 7, BF16))
    assert cost == Cost(flops=0, bytes=4 * 5 * 7 + 4 + 4 * 5 * 7 + 2 * 5 * 7 + 4 * 5)

"""How tokens enter: image patches into the vision tower, the prompt into the prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from pi0_engine.kernels.gemm import gemm
from pi0_engine.kernels.linear import stream_bytes
from pi0_engine.kernels.registry import Cost, nbytes, op
from pi0_engine.kernels.stream import Scratch, Stream


def _patch_embed_cost(patches: Tensor, weight: Tensor, position: Tensor, *, out: Stream, scratch: Scratch) -> Cost:
    return Cost(2.0 * patches.shape[0] * weight.numel(), nbytes(patches, weight, position) + stream_bytes(out))


@op(cost=_patch_embed_cost, triton="gpu.linear")
def patch_embed(patches: Tensor, weight: Tensor, position: Tensor, *, out: Stream, scratch: Scratch) -> None:
    """Project each patch and add its position embedding.

    patches float32 [N * n, p * p * 3]: n patches of each of N images, row-major in the image; a patch's pixels row by
    row with the channel fastest. weight [W, p * p * 3]; position [n, W] with the projection's bias already added; out
    [N * n, W].
    """
    y = gemm(patches, weight).unflatten(0, (-1, position.shape[0])) + position
    out.write(y.flatten(0, 1), None)


def _embed_prompt_cost(prompt: Tensor, start: int, length: Tensor, *, out: Stream) -> Cost:
    return Cost(0.0, nbytes(prompt[: out.x.shape[0]], length) + stream_bytes(out))


@op(cost=_embed_prompt_cost, triton="gpu.prompt")
def embed_prompt(prompt: Tensor, start: int, length: Tensor, *, out: Stream) -> None:
    """The prompt of one observation, as the rows behind its image tokens; zeros behind its last token.

    prompt float32 [L, W], embedded tokens, of which the first rows are read; out [rows, W], rows <= L; ``start`` image
    tokens stand before ``out``. length int32 [1]: how many tokens of the observation are valid, images included.
    """
    rows = out.x.shape[0]
    valid = torch.arange(start, start + rows, device=prompt.device) < length
    out.write(torch.where(valid[:, None], prompt[:rows], 0.0), None)

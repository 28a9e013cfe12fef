"""What training minimises: π0's flow-matching loss, with several noises for one look at the scene."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pi0_engine.reference.model import Pi0Reference


@dataclass(frozen=True)
class Batch:
    """B observations and the chunks that followed them.

    Attributes:
        images: float32 [B, V, S, S, 3] in [-1, 1]; every camera is there.
        image_masks: bool [B, V], all True.
        tokens, token_mask: int64 and bool [B, L].
        state: float32 [B, action_dim], normalised and zero-padded.
        actions: float32 [B, H, action_dim], normalised and zero-padded.
        valid: bool [B, H], the actions that count.
    """

    images: Tensor
    image_masks: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    actions: Tensor
    valid: Tensor


def flow_matching_loss(model: Pi0Reference, batch: Batch, noise: Tensor, time: Tensor) -> Tensor:
    """The mean of :meth:`Pi0Reference.loss` over K noises per observation and the valid actions: a scalar.

    The prefix attends to nothing behind it, so its keys and values serve all K suffixes; they are 17 of 150 tokens, so
    K draws cost little more than one and average out most of the loss's noise.

    Args:
        noise: float32 [B, K, H, action_dim].
        time: float32 [B, K], drawn with :func:`pi0_engine.reference.model.sample_training_time`.
    """
    draws = noise.shape[1]
    prefix, pad = model.embed_prefix(batch.images, batch.image_masks, batch.tokens, batch.token_mask)
    cache = [
        (keys.repeat_interleave(draws, 0), values.repeat_interleave(draws, 0))
        for keys, values in model.prefill(prefix, pad)
    ]
    t = time[..., None, None]
    x_t = t * noise + (1 - t) * batch.actions[:, None]
    velocity = model.velocity(
        batch.state.repeat_interleave(draws, 0),
        pad.repeat_interleave(draws, 0),
        cache,
        x_t.flatten(0, 1),
        time.flatten(),
    )
    error = (velocity.float().view(noise.shape) - (noise - batch.actions[:, None])).square().mean(dim=-1)
    valid = batch.valid[:, None].expand(error.shape)
    return (error * valid).sum() / valid.sum()

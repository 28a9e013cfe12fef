"""``ModelInputs``: what the network reads, whatever robot it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pi0_engine.config import Pi0Config


@dataclass(frozen=True)
class ModelInputs:
    """A batch of B observations, ready for the network. All tensors on the CPU.

    Attributes:
        images: float32 [B, V, S, S, 3] in [-1, 1], V camera slots (1..4) of S x S pixels, in prefix order.
        image_masks: bool [B, V]; a slot with False is absent and its pixels are never read.
        tokens: int64 [B, L] prompt token ids, right-padded.
        token_mask: bool [B, L], True for real tokens (a prefix of each row).
        state: float32 [B, action_dim], normalised and zero-padded. π0.5 reads it from the prompt instead.
    """

    images: torch.Tensor
    image_masks: torch.Tensor
    tokens: torch.Tensor
    token_mask: torch.Tensor
    state: torch.Tensor

    @property
    def batch(self) -> int:
        return self.images.shape[0]

    def validate(self, config: Pi0Config) -> None:
        """Raise ValueError naming the first tensor whose shape, dtype or content the model cannot take."""
        batch, views = self.images.shape[:2] if self.images.ndim == 5 else (0, 0)
        size, length = config.vision.image_size, self.tokens.shape[-1]
        expected = {
            "images": ((batch, views, size, size, 3), torch.float32),
            "image_masks": ((batch, views), torch.bool),
            "tokens": ((batch, length), torch.int64),
            "token_mask": ((batch, length), torch.bool),
            "state": ((batch, config.action_dim), torch.float32),
        }
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or min(shape) < 1:
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)} with no empty axis"
                )
        if not 1 <= views <= 4:
            raise ValueError(f"images has {views} camera slots, expected 1 to 4")
        if length > config.token_capacity:
            raise ValueError(f"tokens has length {length}, the model takes at most {config.max_token_len}")
        lengths = self.token_mask.sum(dim=1)
        if not bool((self.token_mask == (torch.arange(length) < lengths[:, None])).all()):
            raise ValueError("token_mask has a gap: expected True for the first tokens of each row, then False")
        if bool((~self.image_masks.any(dim=1) & (lengths == 0)).any()):
            raise ValueError("an observation has no present camera and no prompt token: the prefix would be empty")
        vocab_size = config.llm.vocab_size
        assert vocab_size is not None
        used = self.tokens[self.token_mask]
        if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < vocab_size):
            raise ValueError(
                f"tokens span {int(used.min())}..{int(used.max())}, the vocabulary is 0..{vocab_size - 1}: "
                "tokenizer and checkpoint do not belong together"
            )
        if not bool(torch.isfinite(self.state).all()):
            raise ValueError("state contains NaN or infinity")

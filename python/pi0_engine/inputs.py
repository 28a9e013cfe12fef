"""``ModelInputs``: what the network reads, whatever robot it came from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.images import FramePreprocessor

#: Pixels lie in [-1, 1]. Resampling filters overshoot a little; unscaled pixels (0..255) are far outside.
PIXEL_LIMIT = 1.5


class NotFiniteError(ValueError):
    """The network computed NaN or infinity."""


@dataclass(frozen=True)
class ModelInputs:
    """A batch of B observations, ready for the network. All tensors on the CPU.

    The cameras come either as ``images`` or as ``frames``; the other is None.

    Attributes:
        image_masks: bool [B, V]; a slot with False is absent and its pixels are never read.
        tokens: int64 [B, L] prompt token ids, right-padded.
        token_mask: bool [B, L], True for real tokens (a prefix of each row).
        state: float32 [B, action_dim], normalised and zero-padded. π0.5 reads it from the prompt instead.
        images: float32 [B, V, S, S, 3] in [-1, 1], V camera slots (1..4) of S x S pixels, in prefix order.
        frames: for each observation its present cameras, in prefix order: uint8 [H, W, 3] of any size, which the engine
            resizes itself (on a GPU, inside the graph).
    """

    image_masks: torch.Tensor
    tokens: torch.Tensor
    token_mask: torch.Tensor
    state: torch.Tensor
    images: torch.Tensor | None = None
    frames: tuple[tuple[NDArray[np.uint8], ...], ...] | None = None

    @property
    def batch(self) -> int:
        return self.image_masks.shape[0]

    @property
    def pixels(self) -> torch.Tensor:
        """``images``, of inputs that have them.

        Raises:
            ValueError: they have frames instead.
        """
        if self.images is None:
            raise ValueError("the inputs hold frames of the cameras' own sizes, expected resized images")
        return self.images

    def resized(self, preprocess: FramePreprocessor) -> ModelInputs:
        """The same observations with images in place of frames, for the reference model; absent cameras are zeros."""
        if self.frames is None:
            return self
        present = [frame for row in self.frames for frame in row]
        images = torch.zeros(*self.image_masks.shape, preprocess.size, preprocess.size, 3)
        if present:
            images[self.image_masks] = torch.from_numpy(preprocess(present))
        return dataclasses.replace(self, images=images, frames=None)

    def validate(self, config: Pi0Config) -> None:
        """Raise ValueError naming the first tensor whose shape, dtype or content the model cannot take."""
        size = config.vision.image_size
        if (self.images is None) == (self.frames is None):
            raise ValueError("the inputs hold both images and frames, or neither: expected one of them")
        expected: dict[str, tuple[tuple[str | int, ...], torch.dtype]] = {
            "images": (("B", "V", size, size, 3), torch.float32),
            "image_masks": (("B", "V"), torch.bool),
            "tokens": (("B", "L"), torch.int64),
            "token_mask": (("B", "L"), torch.bool),
            "state": (("B", config.action_dim), torch.float32),
        }
        sizes: dict[str | int, int] = {}  # B, V and L are what the first tensor says
        if self.images is None:
            del expected["images"]
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            found = tuple(tensor.shape)
            if len(found) == len(shape):
                sizes = {**{letter: n for letter, n in zip(shape, found, strict=True) if n > 0}, **sizes}
            wanted = [letter if isinstance(letter, int) else sizes.get(letter, letter) for letter in shape]
            if list(found) != wanted or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {list(found)}, expected {dtype} {_shape_text(wanted)}")
        views, length = self.image_masks.shape[1], self.tokens.shape[1]
        if views > 4:
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
        if self.frames is not None:
            given, present_cameras = [len(f) for f in self.frames], self.image_masks.sum(dim=1).tolist()
            if given != present_cameras:
                raise ValueError(f"frames holds {given} frames per observation, image_masks says {present_cameras}")
            return
        images = self.pixels
        for slot in range(views):
            present = images[self.image_masks[:, slot], slot]
            low, high = present.aminmax() if present.numel() else (torch.zeros(()), torch.zeros(()))
            if not (low >= -PIXEL_LIMIT and high <= PIXEL_LIMIT):  # false for NaN
                raise ValueError(f"images of camera slot {slot} span {low:.4g} to {high:.4g}, expected -1 to 1")


def _shape_text(shape: list[str | int]) -> str:
    """[2, V, 224, 224, 3]: sizes, and a letter where any positive one would do."""
    return f"[{', '.join(map(str, shape))}]"

"""``ModelInputs``: what the network reads, whatever robot it came from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.images.resize import FramePreprocessor

#: Pixels lie in [-1, 1]. Resampling filters overshoot a little; unscaled pixels (0..255) are far outside.
PIXEL_LIMIT = 1.5


class NotFiniteError(ValueError):
    """The network computed NaN or infinity."""


@dataclass(frozen=True)
class ModelInputs:
    """A batch of B observations, ready for the network. numpy arrays: whoever makes them needs no torch.

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

    image_masks: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    token_mask: NDArray[np.bool_]
    state: NDArray[np.float32]
    images: NDArray[np.float32] | None = None
    frames: tuple[tuple[NDArray[np.uint8], ...], ...] | None = None

    @property
    def batch(self) -> int:
        return int(self.image_masks.shape[0])

    @property
    def pixels(self) -> NDArray[np.float32]:
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
        images = np.zeros((*self.image_masks.shape, preprocess.size, preprocess.size, 3), np.float32)
        if present:
            images[self.image_masks] = preprocess(present)
        return dataclasses.replace(self, images=images, frames=None)

    def validate(self, config: Pi0Config) -> None:
        """Raise ValueError naming the first array whose shape, dtype or content the model cannot take."""
        size = config.vision.image_size
        if (self.images is None) == (self.frames is None):
            raise ValueError("the inputs hold both images and frames, or neither: expected one of them")
        expected: dict[str, tuple[tuple[str | int, ...], DTypeLike]] = {
            "images": (("B", "V", size, size, 3), np.float32),
            "image_masks": (("B", "V"), np.bool_),
            "tokens": (("B", "L"), np.int64),
            "token_mask": (("B", "L"), np.bool_),
            "state": (("B", config.action_dim), np.float32),
        }
        sizes: dict[str | int, int] = {}  # B, V and L are what the first array says
        if self.images is None:
            del expected["images"]
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray):
                raise ValueError(
                    f"{name} is of type {type(array).__name__}, expected a numpy array of {np.dtype(dtype)}"
                )
            found = array.shape
            if len(found) == len(shape):
                sizes = {**{letter: n for letter, n in zip(shape, found, strict=True) if n > 0}, **sizes}
            wanted = [letter if isinstance(letter, int) else sizes.get(letter, letter) for letter in shape]
            if list(found) != wanted or array.dtype != dtype:
                given = f"{array.dtype} {list(found)}"
                raise ValueError(f"{name} is {given}, expected {np.dtype(dtype)} {_shape_text(wanted)}")
        views, length = self.image_masks.shape[1], self.tokens.shape[1]
        if views > 4:
            raise ValueError(f"images has {views} camera slots, expected 1 to 4")
        if length > config.token_capacity:
            raise ValueError(f"tokens has length {length}, the model takes at most {config.max_token_len}")
        lengths = self.token_mask.sum(axis=1)
        if not np.array_equal(self.token_mask, np.arange(length) < lengths[:, None]):
            raise ValueError("token_mask has a gap: expected True for the first tokens of each row, then False")
        if (~self.image_masks.any(axis=1) & (lengths == 0)).any():
            raise ValueError("an observation has no present camera and no prompt token: the prefix would be empty")
        vocab_size = config.llm.vocab_size
        assert vocab_size is not None
        used = self.tokens[self.token_mask]
        if used.size and not (used.min() >= 0 and used.max() < vocab_size):
            raise ValueError(
                f"tokens span {used.min()}..{used.max()}, the vocabulary is 0..{vocab_size - 1}: "
                "tokenizer and checkpoint do not belong together"
            )
        if not np.isfinite(self.state).all():
            raise ValueError("state contains NaN or infinity")
        if self.frames is not None:
            held, present_cameras = [len(f) for f in self.frames], self.image_masks.sum(axis=1).tolist()
            if held != present_cameras:
                raise ValueError(f"frames holds {held} frames per observation, image_masks says {present_cameras}")
            return
        images = self.pixels
        for slot in range(views):
            present = images[self.image_masks[:, slot], slot]
            low, high = (present.min(), present.max()) if present.size else (0.0, 0.0)
            if not (low >= -PIXEL_LIMIT and high <= PIXEL_LIMIT):  # false for NaN
                raise ValueError(f"images of camera slot {slot} span {low:.4g} to {high:.4g}, expected -1 to 1")


def _shape_text(shape: list[str | int]) -> str:
    """[2, V, 224, 224, 3]: sizes, and a letter where any positive one would do."""
    return f"[{', '.join(map(str, shape))}]"

"""ModelInputs: what the network can take, and what is said of the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from models import random_inputs, small_config
from pi0_engine.inputs import ModelInputs

CONFIG = small_config("pi0")  # 28 pixels, 12 tokens, a vocabulary of 97, 7 actions


def two() -> ModelInputs:
    return random_inputs(CONFIG, [[True, False, True]] * 2, [5, 0])


def test_what_the_model_takes() -> None:
    two().validate(CONFIG)
    assert two().batch == 2
    random_inputs(CONFIG, [[True]], [0], length=1).validate(CONFIG)
    random_inputs(CONFIG, [[True] * 4], [12]).validate(CONFIG)
    random_inputs(CONFIG, [[False]], [1]).validate(CONFIG)


def test_padding_ids_are_not_looked_at() -> None:
    inputs = two()
    dataclasses.replace(inputs, tokens=inputs.tokens.masked_fill(~inputs.token_mask, 10**9)).validate(CONFIG)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images", lambda t: t.double(), r"images is torch\.float64 \[2, 3, 28, 28, 3\], expected torch\.float32"),
        ("images", lambda t: (t * 127).byte(), r"images is torch\.uint8"),
        ("images", lambda t: t.permute(0, 1, 4, 2, 3), r"images is torch\.float32 \[2, 3, 3, 28, 28\]"),
        ("images", lambda t: t[:, :, :14], r"images is .* \[2, 3, 14, 28, 3\]"),
        ("images", lambda t: t[0], r"images is torch\.float32 \[3, 28, 28, 3\]"),
        ("images", lambda t: t[:, :0], r"images is torch\.float32 \[2, 0, 28, 28, 3\]"),
        ("images", lambda t: t[:0], r"images is torch\.float32 \[0, 3, 28, 28, 3\]"),
        ("image_masks", lambda t: t.float(), r"image_masks is torch\.float32 \[2, 3\], expected torch\.bool \[2, 3\]"),
        ("image_masks", lambda t: t[:, :2], r"image_masks is torch\.bool \[2, 2\], expected torch\.bool \[2, 3\]"),
        ("tokens", lambda t: t.int(), r"tokens is torch\.int32 \[2, 12\], expected torch\.int64 \[2, 12\]"),
        ("tokens", lambda t: t[:1], r"tokens is torch\.int64 \[1, 12\], expected torch\.int64 \[2, 12\]"),
        ("token_mask", lambda t: t.long(), r"token_mask is torch\.int64 \[2, 12\], expected torch\.bool"),
        ("token_mask", lambda t: t[:, :6], r"token_mask is torch\.bool \[2, 6\], expected torch\.bool \[2, 12\]"),
        ("token_mask", lambda t: t.flip(1), "token_mask has a gap: expected True for the first tokens of each row"),
        ("state", lambda t: t.double(), r"state is torch\.float64 \[2, 7\], expected torch\.float32 \[2, 7\]"),
        ("state", lambda t: t[:, :6], r"state is torch\.float32 \[2, 6\], expected torch\.float32 \[2, 7\]"),
        ("images", lambda t: (t + 1) * 127.5, "images of camera slot 0 span .* to 2.*, expected -1 to 1"),
        ("images", lambda t: t * torch.nan, "images of camera slot 0 span nan to nan"),
        ("tokens", lambda t: t[0, 0], r"tokens is torch\.int64 \[\], expected torch\.int64 \[2, L\]"),
        ("state", lambda t: t / 0, "state contains NaN or infinity"),
        ("tokens", lambda t: t - 97, r"tokens span -\d+\.\.-\d+, the vocabulary is 0\.\.96"),
        ("tokens", lambda t: t + 97, "tokenizer and checkpoint do not belong together"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    inputs = dataclasses.replace(two(), **{name: change(getattr(two(), name))})
    with pytest.raises(ValueError, match=message):
        inputs.validate(CONFIG)


def test_absent_cameras_are_not_looked_at() -> None:
    inputs = two()
    absent = ~inputs.image_masks[:, :, None, None, None]
    dataclasses.replace(inputs, images=inputs.images.masked_fill(absent, torch.nan)).validate(CONFIG)


def test_too_many_cameras() -> None:
    with pytest.raises(ValueError, match="images has 5 camera slots, expected 1 to 4"):
        random_inputs(CONFIG, [[True] * 5]).validate(CONFIG)


def test_an_over_long_prompt() -> None:
    with pytest.raises(ValueError, match="tokens has length 13, the model takes at most 12"):
        random_inputs(CONFIG, length=13).validate(CONFIG)


def test_an_empty_prefix() -> None:
    with pytest.raises(ValueError, match="no present camera and no prompt token: the prefix would be empty"):
        random_inputs(CONFIG, [[True], [False]], [0, 0]).validate(CONFIG)

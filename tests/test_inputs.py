"""ModelInputs: what the network can take, and what is said of the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pi0_engine.inputs import ModelInputs
from tests.support.models import random_inputs, small_config

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
    dataclasses.replace(inputs, tokens=np.where(inputs.token_mask, inputs.tokens, 10**9)).validate(CONFIG)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images", lambda t: t.astype(np.float64), r"images is float64 \[2, 3, 28, 28, 3\], expected float32"),
        ("images", lambda t: np.abs(t * 127).astype(np.uint8), r"images is uint8"),
        ("images", lambda t: t.transpose(0, 1, 4, 2, 3), r"images is float32 \[2, 3, 3, 28, 28\]"),
        ("images", lambda t: t[:, :, :14], r"images is .* \[2, 3, 14, 28, 3\]"),
        ("images", lambda t: t[0], r"images is float32 \[3, 28, 28, 3\]"),
        ("images", lambda t: t[:, :0], r"images is float32 \[2, 0, 28, 28, 3\]"),
        ("images", lambda t: t[:0], r"images is float32 \[0, 3, 28, 28, 3\]"),
        ("image_masks", lambda t: t.astype(np.float32), r"image_masks is float32 \[2, 3\], expected bool \[2, 3\]"),
        ("image_masks", lambda t: t[:, :2], r"image_masks is bool \[2, 2\], expected bool \[2, 3\]"),
        ("tokens", lambda t: t.astype(np.int32), r"tokens is int32 \[2, 12\], expected int64 \[2, 12\]"),
        ("tokens", lambda t: t[:1], r"tokens is int64 \[1, 12\], expected int64 \[2, 12\]"),
        ("token_mask", lambda t: t.astype(np.int64), r"token_mask is int64 \[2, 12\], expected bool"),
        ("token_mask", lambda t: t[:, :6], r"token_mask is bool \[2, 6\], expected bool \[2, 12\]"),
        ("token_mask", lambda t: t[:, ::-1], "token_mask has a gap: expected True for the first tokens of each row"),
        ("state", lambda t: t.astype(np.float64), r"state is float64 \[2, 7\], expected float32 \[2, 7\]"),
        ("state", lambda t: t[:, :6], r"state is float32 \[2, 6\], expected float32 \[2, 7\]"),
        ("images", lambda t: (t + 1) * np.float32(127.5), "images of camera slot 0 span .* to 2.*, expected -1 to 1"),
        ("images", lambda t: t * np.float32(np.nan), "images of camera slot 0 span nan to nan"),
        ("tokens", lambda t: t[0, 0], "tokens is of type int64, expected a numpy array of int64"),
        ("state", torch.from_numpy, "state is of type Tensor, expected a numpy array of float32"),
        ("tokens", lambda t: t[0], r"tokens is int64 \[12\], expected int64 \[2, L\]"),
        ("state", lambda t: t * np.float32(np.inf), "state contains NaN or infinity"),
        ("tokens", lambda t: t - 97, r"tokens span -\d+\.\.-\d+, the vocabulary is 0\.\.96"),
        ("tokens", lambda t: t + 97, "tokenizer and checkpoint do not belong together"),
    ],
)
def test_an_array_that_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    inputs = dataclasses.replace(two(), **{name: change(getattr(two(), name))})
    with pytest.raises(ValueError, match=message):
        inputs.validate(CONFIG)


def test_absent_cameras_are_not_looked_at() -> None:
    inputs = two()
    absent = ~inputs.image_masks[:, :, None, None, None]
    dataclasses.replace(inputs, images=np.where(absent, np.float32(np.nan), inputs.images)).validate(CONFIG)


def test_too_many_cameras() -> None:
    with pytest.raises(ValueError, match="images has 5 camera slots, expected 1 to 4"):
        random_inputs(CONFIG, [[True] * 5]).validate(CONFIG)


def test_an_over_long_prompt() -> None:
    with pytest.raises(ValueError, match="tokens has length 13, the model takes at most 12"):
        random_inputs(CONFIG, length=13).validate(CONFIG)


def test_an_empty_prefix() -> None:
    with pytest.raises(ValueError, match="no present camera and no prompt token: the prefix would be empty"):
        random_inputs(CONFIG, [[True], [False]], [0, 0]).validate(CONFIG)


def changed_last(name: str, value: Any) -> ModelInputs:
    """Two observations, of which the last number that is looked at is another: a real token, a present camera."""
    inputs = random_inputs(CONFIG, [[True, False, True]] * 2, [5, 12])
    array = getattr(inputs, name).copy()
    array[(-1,) * array.ndim] = value
    return dataclasses.replace(inputs, **{name: array})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", 3.0, "images of camera slot 2 span .* to 3"),
        ("images", np.nan, "images of camera slot 2 span nan to nan"),
        ("images", -3.0, "images of camera slot 2 span -3"),
        ("state", np.nan, "state contains NaN or infinity"),
        ("state", np.inf, "state contains NaN or infinity"),
        ("tokens", 97, r"tokens span \d+\.\.97, the vocabulary is 0\.\.96"),
        ("tokens", -1, r"tokens span -1\.\."),
    ],
)
def test_the_last_observation_of_a_batch_is_looked_at(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed_last(name, value).validate(CONFIG)


def test_a_gap_in_the_last_observations_prompt() -> None:
    inputs = random_inputs(CONFIG, [[True]] * 2, [5, 12])
    inputs.token_mask[-1, 3] = False
    with pytest.raises(ValueError, match="token_mask has a gap"):
        inputs.validate(CONFIG)


def test_frames_of_the_last_observation_are_counted() -> None:
    inputs = random_inputs(CONFIG, [[True, True]] * 2, [5, 5])
    frame = np.zeros((4, 4, 3), np.uint8)
    short = dataclasses.replace(inputs, images=None, frames=((frame, frame), (frame,)))
    with pytest.raises(ValueError, match=r"frames holds \[2, 1\] frames per observation, image_masks says \[2, 2\]"):
        short.validate(CONFIG)

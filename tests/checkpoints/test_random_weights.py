"""Seeded weights are the same everywhere, however they are drawn."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch

from pi0_engine.checkpoints import random_weights
from pi0_engine.checkpoints.names import EMBEDDING_KEY, TIED_EMBEDDING_KEY
from pi0_engine.checkpoints.parameters import parameter_shapes
from pi0_engine.checkpoints.random_weights import RandomCheckpoint, random_parameter
from tests.support.checkpoints import expected_tensor, openpi_tensors, tiny_config
from tests.support.paths import DATA

CHECKSUMS = json.loads((DATA / "checkpoints/parameter_crc32.json").read_text())


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
def test_seed_0_gives_the_recorded_weights(model_type: str) -> None:
    """The checksums were taken where openpi's own outputs for these weights were recorded."""
    tensors = openpi_tensors(tiny_config(model_type), embedding="both")
    found = {key: f"{zlib.crc32(tensor.numpy().tobytes()):08x}" for key, tensor in tensors.items()}
    assert found == CHECKSUMS[model_type]


def test_random_checkpoint_holds_the_seeded_weights() -> None:
    config = tiny_config("pi05")
    checkpoint = RandomCheckpoint(config)
    assert (checkpoint.config, checkpoint.format, dict(checkpoint.shapes)) == (
        config,
        "random",
        parameter_shapes(config),
    )
    for name in checkpoint.shapes:
        assert torch.equal(checkpoint.tensor(name), expected_tensor(name, config)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drawing_in_pieces_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "_CHUNK_VALUES", 1001)
    config = tiny_config("pi0")
    checkpoint = RandomCheckpoint(config, dtype=dtype)
    for name in ("llm.embed_tokens.weight", "vision.patch_embedding.weight", "vision.post_norm.weight"):
        assert torch.equal(checkpoint.tensor(name), expected_tensor(name, config).to(dtype)), name


def test_seeds_and_names_give_different_weights() -> None:
    drawn = [random_parameter(key, (8, 8), seed) for key in ("a.weight", "b.weight") for seed in (0, 1, 2)]
    assert len({array.tobytes() for array in drawn}) == len(drawn)
    assert np.array_equal(random_parameter("a.weight", (8, 8), 7), random_parameter("a.weight", (8, 8), 7))


def test_embedding_rows_do_not_depend_on_the_vocabulary_and_are_tied() -> None:
    small, large = (random_parameter(EMBEDDING_KEY, (rows, 64)) for rows in (10, 100))
    assert np.array_equal(small, large[:10])
    assert np.array_equal(small, random_parameter(TIED_EMBEDDING_KEY, (10, 64)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        RandomCheckpoint(tiny_config("pi0"), seed=-1)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8, expected one of"):
        RandomCheckpoint(tiny_config("pi0"), dtype=torch.int8)
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        RandomCheckpoint(tiny_config("pi0")).tensor("nothing")

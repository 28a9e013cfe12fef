"""safetensors checkpoints: every layout bit for bit, nothing read early, one complete error for what does not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.checkpoints.names import TIED_EMBEDDING_KEY, UNUSED_KEYS
from pi0_engine.config import Pi0Config
from tests.support.checkpoints import (
    assert_holds_the_seeded_weights,
    lerobot_config_json,
    openpi_shapes,
    openpi_tensors,
    tiny_config,
    write_lerobot,
    write_openpi,
    write_shapes,
)

PI0 = tiny_config("pi0")


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_openpi_directory_round_trips(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    config = tiny_config(model_type)
    checkpoint = open_checkpoint(write_openpi(tmp_path, config, dtype))
    assert (checkpoint.format, checkpoint.path) == ("openpi-pytorch", tmp_path)
    assert_holds_the_seeded_weights(checkpoint, config, dtype)


def test_a_file_alone_needs_and_takes_a_config(tmp_path: Path) -> None:
    file = tmp_path / "pi0.safetensors"
    save_file(openpi_tensors(PI0), file)
    assert_holds_the_seeded_weights(open_checkpoint(str(file), config=PI0), PI0)
    with pytest.raises(ValueError, match=r"pi0\.safetensors: cannot infer the number of vision heads .* give a config"):
        open_checkpoint(file)


def test_the_weight_file_of_a_directory_stands_for_the_directory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_openpi(tmp_path, PI0) / "model.safetensors")
    assert (checkpoint.config, checkpoint.path) == (PI0, tmp_path)


@pytest.mark.parametrize(
    ("embedding", "ignored"),
    [("lm_head", UNUSED_KEYS), ("embed_tokens", UNUSED_KEYS), ("both", (*UNUSED_KEYS, TIED_EMBEDDING_KEY))],
)
def test_the_tied_embedding_is_found_under_either_name(
    tmp_path: Path, embedding: str, ignored: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    checkpoint = open_checkpoint(write_openpi(tmp_path, PI0, embedding=embedding))
    assert_holds_the_seeded_weights(checkpoint, PI0)
    assert checkpoint.ignored == ignored
    assert all(key in caplog.text for key in ignored)


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
@pytest.mark.parametrize("flat_vision", [False, True])
def test_lerobot_directory_round_trips(tmp_path: Path, model_type: str, flat_vision: bool) -> None:
    config = tiny_config(model_type)
    checkpoint = open_checkpoint(write_lerobot(tmp_path, config, flat_vision=flat_vision), config=config)
    assert (checkpoint.format, checkpoint.path) == ("lerobot", tmp_path)
    assert_holds_the_seeded_weights(checkpoint, config)


def test_lerobot_without_the_prefix_is_recognised_by_its_config(tmp_path: Path) -> None:
    write_openpi(tmp_path, PI0)
    (tmp_path / "config.json").write_text(json.dumps(lerobot_config_json(PI0)))
    assert open_checkpoint(tmp_path, config=PI0).format == "lerobot"


@pytest.mark.parametrize("layout", ["20000/model.safetensors", "last/../20000/pretrained_model/model.safetensors"])
def test_of_numbered_steps_the_newest_is_taken(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "9000").mkdir()
    (tmp_path / "last").mkdir()
    directory = (tmp_path / layout).resolve().parent
    write_openpi(directory, PI0)
    assert open_checkpoint(tmp_path).path == directory
    assert f"taking {directory.relative_to(tmp_path)}" in caplog.text


def test_full_size_files_open_without_reading_them(tmp_path: Path) -> None:
    config = Pi0Config("pi05")
    write_shapes(tmp_path / "model.safetensors", openpi_shapes(config))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert checkpoint.tensor("llm.embed_tokens.weight")[[0, 257151]].shape == (2, 2048)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights")
    (tmp_path / "old.ckpt").write_bytes(b"anything")
    for name in ("weights.pt", "weights", "old.ckpt"):
        with pytest.raises(ValueError, match=r"is a pickle file .*runs whatever code .*save_file"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds weights as pickle files only .*'old\.ckpt'"):
        open_checkpoint(tmp_path)


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint: expected model\.safetensors.*found nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no checkpoint: .*found \['notes\.txt'\]"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is not a checkpoint"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match=r"params has no manifest\.ocdbt"):
        open_checkpoint(tmp_path)


def test_unknown_parameter(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_openpi(tmp_path, PI0))
    with pytest.raises(ValueError, match=r"no parameter 'time_mlp_in\.weight'"):
        checkpoint.tensor("time_mlp_in.weight")


def test_base_is_for_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a whole checkpoint, not a LoRA adapter"):
        open_checkpoint(write_openpi(tmp_path, PI0), base=tmp_path)

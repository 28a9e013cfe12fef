"""The model's sizes as config.json tells them, in openpi's and lerobot's schema."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.config import GEMMA_2B, GEMMA_300M, Pi0Config
from tests.support.checkpoints import (
    lerobot_config_json,
    openpi_shapes,
    tiny_config,
    write_openpi,
    write_shapes,
)

PI0 = tiny_config("pi0")


def openpi_json(**changes: object) -> dict[str, object]:
    variants = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    return {"action_dim": 32, "action_horizon": 50, **variants, "precision": "bfloat16", **changes}


def test_openpi_config_json_gives_sizes_and_horizon(tmp_path: Path) -> None:
    lora = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}
    write_shapes(tmp_path / "model.safetensors", openpi_shapes(Pi0Config("pi05")))
    (tmp_path / "config.json").write_text(json.dumps(openpi_json(action_horizon=15, **lora)))
    assert open_checkpoint(tmp_path).config == Pi0Config("pi05", llm=GEMMA_2B, expert=GEMMA_300M, action_horizon=15)


def test_openpi_dummy_variant(tmp_path: Path) -> None:
    dummy = dataclasses.replace(GEMMA_300M, width=64, depth=4, mlp_dim=128, head_dim=16)
    config = Pi0Config("pi0", llm=dataclasses.replace(dummy, vocab_size=257152), expert=dummy)
    write_shapes(tmp_path / "model.safetensors", openpi_shapes(config))
    description = openpi_json(paligemma_variant="dummy", action_expert_variant="dummy")
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert open_checkpoint(tmp_path).config == config


def test_lerobot_config_json_gives_the_model(tmp_path: Path) -> None:
    config = Pi0Config("pi05", action_horizon=30, num_steps=5, max_token_len=150)
    shapes = {f"model.{key}": shape for key, shape in openpi_shapes(config).items()}
    write_shapes(tmp_path / "model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps(lerobot_config_json(config)))
    assert open_checkpoint(tmp_path).config == config


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (openpi_json(paligemma_variant="gemma_9b"), "paligemma_variant is 'gemma_9b', expected one of"),
        (openpi_json(action_dim=0), "action_dim is 0, expected a positive integer"),
        ({**lerobot_config_json(PI0), "type": "act"}, "policy's type is 'act', expected 'pi0' or 'pi05'"),
        ({**lerobot_config_json(PI0), "max_period": 8.0}, r"max_period is 8\.0; only 4\.0 is supported"),
        ({**lerobot_config_json(PI0), "image_resolution": [448, 448]}, r"only \[224, 224\] is supported"),
        ({"model_type": "gemma"}, "describes a model of type 'gemma'; expected the config of"),
        ({"hello": 1}, r"has the keys \['hello'\]; expected the config of"),
        ([], "holds a JSON list, expected an object"),
    ],
)
def test_config_json_that_cannot_be_used(tmp_path: Path, description: object, message: str) -> None:
    write_openpi(tmp_path, PI0)
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        open_checkpoint(tmp_path)


def test_config_json_that_is_not_json(tmp_path: Path) -> None:
    write_openpi(tmp_path, PI0)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        open_checkpoint(tmp_path)


def test_config_json_and_tensors_disagree(tmp_path: Path) -> None:
    write_openpi(tmp_path, PI0)
    (tmp_path / "config.json").write_text(json.dumps(lerobot_config_json(tiny_config("pi05"))))
    with pytest.raises(ValueError, match=r"sizes from config\.json") as error:
        open_checkpoint(tmp_path)
    assert re.search(r"missing \(\d+\)", str(error.value)) and "unexpected" in str(error.value)
    assert "... and" in str(error.value)

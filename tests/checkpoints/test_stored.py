"""What does not fit is named completely, in one error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.checkpoints.names import EMBEDDING_KEY, TIED_EMBEDDING_KEY, openpi_name
from pi0_engine.config import Pi0Config
from tests.support.checkpoints import (
    openpi_shapes,
    openpi_tensors,
    tiny_config,
    write_shapes,
)

PI0 = tiny_config("pi0")


def test_one_error_names_everything(tmp_path: Path) -> None:
    tensors = openpi_tensors(PI0)
    del tensors["action_in_proj.bias"], tensors["state_proj.weight"]
    tensors["value_head.weight"] = torch.zeros(1)
    tensors["time_mlp_out.bias"] = torch.zeros(48)
    tensors["action_out_proj.bias"] = torch.zeros(7)
    tensors["action_out_proj.weight"] = torch.zeros(32, 48, dtype=torch.float64)
    tensors["state_proj.bias"] = torch.zeros(48, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path, config=PI0)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: the tensors are not those of the model (sizes from the given config)",
        "  missing (2):",
        "    action_in_proj.bias",
        "    state_proj.weight",
        "  unexpected (2):",
        "    time_mlp_out.bias",
        "    value_head.weight",
        "  misshapen (1):",
        "    action_out_proj.bias: [7], expected [32]",
        "  not float32, bfloat16, float16 (2):",
        "    action_out_proj.weight: f64",
        "    state_proj.bias: i8",
    ]


def test_float8_weights_are_refused(tmp_path: Path) -> None:
    write_shapes(tmp_path / "model.safetensors", openpi_shapes(PI0), dtype="F8_E4M3", itemsize=1)
    with pytest.raises(ValueError, match=r"not float32, bfloat16, float16 \(106\):\n.*f8_e4m3"):
        open_checkpoint(tmp_path, config=PI0)


def test_missing_tensors_are_named_when_sizes_are_unknown(tmp_path: Path) -> None:
    tensors = openpi_tensors(PI0)
    del tensors[TIED_EMBEDDING_KEY], tensors["action_in_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"missing \(2\):\n    {re.escape(EMBEDDING_KEY)}\n    action_in_proj\.weight"
    ):
        open_checkpoint(tmp_path)


def test_a_published_tower_without_its_last_layer_is_refused(tmp_path: Path) -> None:
    truncated = {key: shape for key, shape in openpi_shapes(Pi0Config("pi0")).items() if ".layers.26." not in key}
    write_shapes(tmp_path / "model.safetensors", truncated)
    with pytest.raises(ValueError, match="have 26 vision layers, a tower of these sizes has 27"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "no tensor of the language model"),
        (["model.backbone.conv1.weight", "model.action_head.bias"], "no tensor of the language model"),
        ([openpi_name("llm.layers.0.q_proj.weight")], "a language model but no action expert"),
    ],
)
def test_other_models(tmp_path: Path, keys: list[str], message: str) -> None:
    write_shapes(tmp_path / "model.safetensors", dict.fromkeys(keys, (8, 8)))
    with pytest.raises(ValueError, match=f"is not a π0 or π0.5 checkpoint: .*{message}") as error:
        open_checkpoint(tmp_path)
    assert keys[0] in str(error.value)

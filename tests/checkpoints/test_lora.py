"""PEFT adapters merged onto a base checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from tests.support.checkpoints import expected_tensor, lerobot_config_json, tiny_config, write_openpi, write_peft

PI0 = tiny_config("pi0")
EXPERT = "paligemma_with_expert.gemma_expert.model.layers"


def factors(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_openpi(tmp_path / "base", PI0)


@pytest.fixture
def adapter_tensors() -> dict[str, torch.Tensor]:
    """One projection of rank 4, one of rank 2, an input layer trained in full, and a bias beside an adapter."""
    return {
        f"{EXPERT}.1.self_attn.q_proj.lora_A.weight": factors(4, 48, seed=0),
        f"{EXPERT}.1.self_attn.q_proj.lora_B.weight": factors(256, 4, seed=1),
        "state_proj.lora_A.weight": factors(2, 32, seed=2),
        "state_proj.lora_B.weight": factors(48, 2, seed=3),
        "state_proj.base_layer.bias": factors(48, seed=4),
        "action_in_proj.weight": factors(48, 32, seed=5),
        "action_in_proj.bias": factors(48, seed=6),
    }


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_adapter_is_merged(
    tmp_path: Path, base: Path, adapter_tensors: dict[str, torch.Tensor], rank_stabilised: bool
) -> None:
    options = {"use_rslora": rank_stabilised, "rank_pattern": {"state_proj": 2}, "modules_to_save": ["action_in_proj"]}
    adapter = write_peft(tmp_path / "adapter", str(base), adapter_tensors, options)
    checkpoint = open_checkpoint(adapter)
    assert (checkpoint.format, checkpoint.path, checkpoint.config) == ("lerobot", adapter, PI0)

    adapted = {
        "action_in_proj.weight": adapter_tensors["action_in_proj.weight"],
        "action_in_proj.bias": adapter_tensors["action_in_proj.bias"],
        "state_proj.bias": adapter_tensors["state_proj.base_layer.bias"],
    }
    keys = {"expert.layers.1.q_proj.weight": f"{EXPERT}.1.self_attn.q_proj", "state_proj.weight": "state_proj"}
    for name, key in keys.items():
        a, b = adapter_tensors[f"{key}.lora_A.weight"], adapter_tensors[f"{key}.lora_B.weight"]
        scale = 10 / a.shape[0] ** (0.5 if rank_stabilised else 1)
        adapted[name] = expected_tensor(name, PI0) + scale * (b @ a)
    for name in checkpoint.shapes:
        torch.testing.assert_close(
            checkpoint.tensor(name), adapted.get(name, expected_tensor(name, PI0)), rtol=1e-5, atol=1e-5, msg=name
        )


def test_merging_onto_bfloat16_keeps_float32(tmp_path: Path, adapter_tensors: dict[str, torch.Tensor]) -> None:
    base = write_openpi(tmp_path / "base", PI0, torch.bfloat16)
    checkpoint = open_checkpoint(write_peft(tmp_path / "adapter", str(base), adapter_tensors))
    assert checkpoint.tensor("state_proj.weight").dtype == torch.float32
    assert checkpoint.tensor("action_out_proj.weight").dtype == torch.bfloat16


def test_config_comes_from_the_adapter_directory(
    tmp_path: Path, base: Path, adapter_tensors: dict[str, torch.Tensor]
) -> None:
    adapter = write_peft(tmp_path / "adapter", str(base), adapter_tensors)
    (adapter / "config.json").write_text(json.dumps(lerobot_config_json(PI0)))
    with pytest.raises(ValueError, match="misshapen"):  # lerobot's file can only name published sizes
        open_checkpoint(adapter)
    assert open_checkpoint(adapter, config=PI0).config == PI0


def test_the_base(tmp_path: Path, base: Path, adapter_tensors: dict[str, torch.Tensor]) -> None:
    adapter = write_peft(tmp_path / "adapter", str(tmp_path / "moved"), adapter_tensors)
    with pytest.raises(ValueError, match=r"its base cannot be opened \(give base\): .*moved' does not exist"):
        open_checkpoint(adapter)
    assert open_checkpoint(adapter, base=base).config == PI0
    write_peft(adapter, "", adapter_tensors)
    with pytest.raises(ValueError, match="does not name its base checkpoint: give base"):
        open_checkpoint(adapter)


def test_one_error_names_all_tensors_that_do_not_fit(tmp_path: Path, base: Path) -> None:
    tensors = {
        "state_proj.lora_A.weight": factors(2, 31, seed=0),
        "state_proj.lora_B.weight": factors(48, 2, seed=0),
        "action_out_proj.lora_A.weight": factors(2, 48, seed=0),
        "action_in_proj.bias": factors(7, seed=0),
        "value_head.lora_A.weight": factors(2, 2, seed=0),
        "time_mlp_in.lora_A.weight": factors(2, 48, seed=0),
        "time_mlp_in.lora_B.weight": factors(48, 2, seed=0),
    }
    with pytest.raises(ValueError, match=r"does not fit its base \(5 tensors\)") as error:
        open_checkpoint(write_peft(tmp_path / "adapter", str(base), tensors))
    for part in (
        r"state_proj.lora_A.weight [2, 31] and its lora_B [48, 2]: the base weight is [48, 32]",
        "action_out_proj.weight: expected matrices lora_A and lora_B, found lora_A",
        "action_in_proj.bias: [7], in the base (48,)",
        "value_head.lora_A.weight (float32 [2, 2]): not a parameter of the model",
        "time_mlp_in.lora_A.weight: the base has no time_mlp_in.weight",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"use_dora": True}, r"\{'use_dora': True\} is more than plain LoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "more than plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights as well"),
    ],
)
def test_other_methods_are_refused(
    tmp_path: Path, base: Path, adapter_tensors: dict[str, torch.Tensor], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
        open_checkpoint(write_peft(tmp_path / "adapter", str(base), adapter_tensors, options))


def test_damaged_adapters(tmp_path: Path, base: Path, adapter_tensors: dict[str, torch.Tensor]) -> None:
    adapter = write_peft(tmp_path / "adapter", str(base), adapter_tensors)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json but no adapter_model\.safetensors"):
        open_checkpoint(adapter)
    for content in ("{", "[]", "{}"):
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match="is not a PEFT adapter's config"):
            open_checkpoint(adapter)

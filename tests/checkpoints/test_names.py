"""The rename table is a bijection, and knows the spellings that lerobot and transformers 5 write."""

from __future__ import annotations

import pytest

from pi0_engine.checkpoints.names import canonical_name, normalize_key, openpi_name
from pi0_engine.checkpoints.parameters import parameter_shapes
from tests.support.checkpoints import tiny_config


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
def test_every_parameter_translates_there_and_back(model_type: str) -> None:
    names = list(parameter_shapes(tiny_config(model_type)))
    keys = [openpi_name(name) for name in names]
    assert len(set(keys)) == len(names)
    assert [canonical_name(key) for key in keys] == names


def test_examples() -> None:
    key = "paligemma_with_expert.gemma_expert.model.layers.17.post_attention_layernorm.dense.bias"
    assert canonical_name(key) == "expert.layers.17.post_attention_norm.dense.bias"
    key = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.3.layer_norm1.weight"
    assert canonical_name(key) == "vision.layers.3.norm1.weight"


def test_lerobot_spellings() -> None:
    key = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.bias"
    assert normalize_key(f"model.{key}") == key
    assert normalize_key(f"model.{key.replace('vision_model.', '')}") == key
    assert normalize_key(key) == key


def test_unknown_names() -> None:
    assert canonical_name("paligemma_with_expert.paligemma.model.language_model.rotary_emb.inv_freq") is None
    assert canonical_name("weight") is None
    with pytest.raises(ValueError, match=r"'llm\.lm_head\.weight' is not the name of a parameter"):
        openpi_name("llm.lm_head.weight")

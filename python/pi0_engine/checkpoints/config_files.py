"""The model's sizes as a checkpoint's ``config.json`` tells them: openpi's, lerobot's or this project's own schema."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pi0_engine.config import GEMMA_2B, GEMMA_300M, GemmaConfig, ModelType, Pi0Config

#: openpi's names of Gemma sizes (models/gemma.py). ``_lora`` variants have the same weights plus adapters.
_VARIANTS = {
    "gemma_2b": GEMMA_2B,
    "gemma_300m": GEMMA_300M,
    "dummy": GemmaConfig(64, 4, 128, num_heads=8, num_kv_heads=1, head_dim=16),
}
#: lerobot's options that the network's arithmetic depends on, and the only values that this engine computes.
_LEROBOT_FIXED = {"image_resolution": [224, 224], "min_period": 4e-3, "max_period": 4.0, "n_obs_steps": 1}


def read_config_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when the file is not a JSON object."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def is_lerobot(data: dict[str, Any]) -> bool:
    """Whether this is a lerobot policy's config.json: those name their policy in ``type``."""
    return "type" in data


def config_from_json(data: dict[str, Any], model_type: ModelType, where: Path) -> Pi0Config:
    """The model that a config.json describes.

    Args:
        data: its content, in one of the three schemas.
        model_type: what the tensors show; openpi's file does not say.
        where: the file, for messages.

    Raises:
        ValueError: another model's config, an unknown variant, or an option that this engine does not compute.
    """
    try:
        if is_lerobot(data):
            return _from_lerobot(data)
        if "vision" in data and "llm" in data:
            return Pi0Config.from_dict(data)
        if "paligemma_variant" in data:
            return _from_openpi(data, model_type)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    model = data.get("model_type") or data.get("architectures")
    described = f"describes a model of type {model!r}" if model else f"has the keys {sorted(data)[:8]}"
    raise ValueError(f"{where} {described}; expected the config of an openpi or lerobot π0 / π0.5 checkpoint")


def _from_openpi(data: dict[str, Any], model_type: ModelType) -> Pi0Config:
    return Pi0Config(
        model_type,
        llm=_variant(data, "paligemma_variant", vocab_size=GEMMA_2B.vocab_size),
        expert=_variant(data, "action_expert_variant", vocab_size=None),
        action_dim=data.get("action_dim", 32),
        action_horizon=data.get("action_horizon", 50),
    )


def _from_lerobot(data: dict[str, Any]) -> Pi0Config:
    if data["type"] not in ("pi0", "pi05"):
        raise ValueError(f"the policy's type is {data['type']!r}, expected 'pi0' or 'pi05'")
    for name, value in _LEROBOT_FIXED.items():
        if data.get(name, value) != value:
            raise ValueError(f"{name} is {data[name]!r}; only {value!r} is supported")
    defaults = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    return Pi0Config(
        data["type"],
        llm=_variant({**defaults, **data}, "paligemma_variant", vocab_size=GEMMA_2B.vocab_size),
        expert=_variant({**defaults, **data}, "action_expert_variant", vocab_size=None),
        action_dim=data.get("max_action_dim", 32),
        max_token_len=data.get("tokenizer_max_length"),
        action_horizon=data.get("chunk_size", 50),
        num_steps=data.get("num_inference_steps", 10),
    )


def _variant(data: dict[str, Any], name: str, vocab_size: int | None) -> GemmaConfig:
    variant = str(data.get(name)).removesuffix("_lora")
    if variant not in _VARIANTS:
        raise ValueError(f"{name} is {data.get(name)!r}, expected one of {sorted(_VARIANTS)} (or with '_lora')")
    return dataclasses.replace(_VARIANTS[variant], vocab_size=vocab_size)

"""openpi's PyTorch parameter names <-> the canonical names of ``parameters.py``: one table, read in both directions.

lerobot's names are openpi's with ``model.`` in front; :func:`normalize_key` removes the differences.
"""

from __future__ import annotations

import re

_PALIGEMMA = "paligemma_with_expert.paligemma.model"
_VISION = f"{_PALIGEMMA}.vision_tower.vision_model"
_LLM = f"{_PALIGEMMA}.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"

#: Where the embedding table is: the decoder's output layer is the same tensor, and safetensors writes one of the two.
EMBEDDING_KEY = f"{_LLM}.embed_tokens.weight"
TIED_EMBEDDING_KEY = "paligemma_with_expert.paligemma.lm_head.weight"

#: Tensors that files carry and the model never reads (openpi's converter leaves this one at its random initial values).
UNUSED_KEYS = ("paligemma_with_expert.gemma_expert.lm_head.weight",)


def _gemma_modules(tower: str, prefix: str) -> dict[str, str]:
    modules = {f"{tower}.embed_tokens": f"{prefix}.embed_tokens"} if tower == "llm" else {}
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        modules[f"{tower}.layers.#.{projection}"] = f"{prefix}.layers.#.self_attn.{projection}"
    for projection in ("gate_proj", "up_proj", "down_proj"):
        modules[f"{tower}.layers.#.{projection}"] = f"{prefix}.layers.#.mlp.{projection}"
    norms = {
        f"{tower}.layers.#.input_norm": f"{prefix}.layers.#.input_layernorm",
        f"{tower}.layers.#.post_attention_norm": f"{prefix}.layers.#.post_attention_layernorm",
        f"{tower}.norm": f"{prefix}.norm",
    }
    modules.update(norms)
    if tower == "expert":  # π0.5: adaRMS has a linear layer where RMSNorm has a weight
        modules.update({f"{canonical}.dense": f"{openpi}.dense" for canonical, openpi in norms.items()})
    return modules


#: Module names, canonical -> openpi; ``#`` stands for the layer's index. The last part (weight, bias) is the same.
_MODULES = {
    "vision.patch_embedding": f"{_VISION}.embeddings.patch_embedding",
    "vision.position_embedding": f"{_VISION}.embeddings.position_embedding",
    "vision.layers.#.norm1": f"{_VISION}.encoder.layers.#.layer_norm1",
    "vision.layers.#.norm2": f"{_VISION}.encoder.layers.#.layer_norm2",
    "vision.layers.#.q_proj": f"{_VISION}.encoder.layers.#.self_attn.q_proj",
    "vision.layers.#.k_proj": f"{_VISION}.encoder.layers.#.self_attn.k_proj",
    "vision.layers.#.v_proj": f"{_VISION}.encoder.layers.#.self_attn.v_proj",
    "vision.layers.#.out_proj": f"{_VISION}.encoder.layers.#.self_attn.out_proj",
    "vision.layers.#.fc1": f"{_VISION}.encoder.layers.#.mlp.fc1",
    "vision.layers.#.fc2": f"{_VISION}.encoder.layers.#.mlp.fc2",
    "vision.post_norm": f"{_VISION}.post_layernorm",
    "projector": f"{_PALIGEMMA}.multi_modal_projector.linear",
    **_gemma_modules("llm", _LLM),
    **_gemma_modules("expert", _EXPERT),
    "action_in_proj": "action_in_proj",
    "action_out_proj": "action_out_proj",
    "state_proj": "state_proj",
    "action_time_mlp_in": "action_time_mlp_in",
    "action_time_mlp_out": "action_time_mlp_out",
    "time_mlp_in": "time_mlp_in",
    "time_mlp_out": "time_mlp_out",
}
_CANONICAL = {openpi: canonical for canonical, openpi in _MODULES.items()}


def openpi_name(canonical: str) -> str:
    """The key of a canonical parameter in openpi's PyTorch state dict.

    Raises:
        ValueError: no parameter has this canonical name.
    """
    name = _translate(canonical, _MODULES)
    if name is None:
        raise ValueError(f"{canonical!r} is not the name of a parameter (see parameters.parameter_shapes)")
    return name


def canonical_name(openpi_key: str) -> str | None:
    """The canonical name of an openpi key, or None where the model has no such module."""
    return _translate(openpi_key, _CANONICAL)


def normalize_key(key: str) -> str:
    """openpi's spelling of a key written by openpi or lerobot.

    lerobot puts ``model.`` in front of every name, and from transformers 5 on the vision tower has lost the
    ``vision_model.`` level.
    """
    key = key.removeprefix("model.")
    vision_tower = f"{_PALIGEMMA}.vision_tower."
    if key.startswith(vision_tower) and not key.startswith(f"{_VISION}."):
        key = f"{_VISION}.{key.removeprefix(vision_tower)}"
    return key


def _translate(name: str, modules: dict[str, str]) -> str | None:
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.layers\.(\d+)\.", module)
    if layer is not None:
        module = f"{module[: layer.start(1)]}#{module[layer.end(1) :]}"
    if module not in modules:
        return None
    translated = f"{modules[module]}.{leaf}"
    return translated if layer is None else translated.replace("#", layer[1])

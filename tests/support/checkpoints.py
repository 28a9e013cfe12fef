"""Tiny checkpoints in every published layout, written from the seeded weights. For tests to import."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from pi0_engine.checkpoints.checkpoint import Checkpoint
from pi0_engine.checkpoints.names import EMBEDDING_KEY, TIED_EMBEDDING_KEY, UNUSED_KEYS, openpi_name
from pi0_engine.checkpoints.parameters import parameter_shapes
from pi0_engine.checkpoints.random_weights import random_parameter
from pi0_engine.config import GemmaConfig, Pi0Config, SiglipConfig

Embedding = Literal["lm_head", "embed_tokens", "both"]


def tiny_config(model_type: Literal["pi0", "pi05"]) -> Pi0Config:
    """The model of the recorded openpi outputs: small, and with every structural trap of the full size."""
    expert_width, expert_mlp = (48, 96) if model_type == "pi0" else (64, 112)
    return Pi0Config(
        model_type,
        vision=SiglipConfig(width=96, depth=2, num_heads=4, mlp_dim=128),
        llm=GemmaConfig(64, 3, 128, num_heads=8, num_kv_heads=1, head_dim=32, vocab_size=2048),
        expert=GemmaConfig(expert_width, 3, expert_mlp, num_heads=8, num_kv_heads=1, head_dim=32),
    )


def expected_tensor(name: str, config: Pi0Config) -> torch.Tensor:
    """float32 value of a canonical parameter in all of these checkpoints."""
    return torch.from_numpy(random_parameter(openpi_name(name), parameter_shapes(config)[name]))


def assert_holds_the_seeded_weights(
    checkpoint: Checkpoint, config: Pi0Config, dtype: torch.dtype = torch.float32
) -> None:
    """Every parameter, bit for bit."""
    assert checkpoint.config == config
    assert dict(checkpoint.shapes) == parameter_shapes(config)
    for name in checkpoint.shapes:
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected_tensor(name, config).to(dtype)), name


def openpi_tensors(
    config: Pi0Config, dtype: torch.dtype = torch.float32, embedding: Embedding = "lm_head"
) -> dict[str, torch.Tensor]:
    """What openpi's converter saves: its state dict, the tied embedding under one of its names, an unused lm_head."""
    tensors = {openpi_name(name): expected_tensor(name, config).to(dtype) for name in parameter_shapes(config)}
    assert config.llm.vocab_size is not None
    unused = (config.llm.vocab_size, config.expert.width)
    tensors[UNUSED_KEYS[0]] = torch.from_numpy(random_parameter(UNUSED_KEYS[0], unused)).to(dtype)
    if embedding != "embed_tokens":
        tensors[TIED_EMBEDDING_KEY] = tensors[EMBEDDING_KEY].clone()
    if embedding == "lm_head":
        del tensors[EMBEDDING_KEY]
    return tensors


def write_shapes(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", itemsize: int = 2) -> Path:
    """A safetensors file of any size that takes no space: its data is a hole."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def openpi_shapes(config: Pi0Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the file that openpi's converter saves, less the unused lm_head."""
    shapes = {openpi_name(name): shape for name, shape in parameter_shapes(config).items()}
    shapes[TIED_EMBEDDING_KEY] = shapes.pop(EMBEDDING_KEY)
    return shapes


def write_openpi(
    directory: Path, config: Pi0Config, dtype: torch.dtype = torch.float32, embedding: Embedding = "lm_head"
) -> Path:
    """``model.safetensors`` and a ``config.json`` in this project's schema (openpi's knows published sizes only)."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(openpi_tensors(config, dtype, embedding), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return directory


def write_lerobot(directory: Path, config: Pi0Config, *, flat_vision: bool = False) -> Path:
    """A lerobot directory. Its config.json can only name published sizes: open it with ``config=``.

    ``flat_vision`` writes the vision tower's names as transformers 5 has them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = openpi_tensors(config, embedding="both")
    if flat_vision:
        tensors = {key.replace(".vision_model.", "."): tensor for key, tensor in tensors.items()}
    save_file({f"model.{key}": tensor for key, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(lerobot_config_json(config)))
    _write_processors(directory)
    return directory


def lerobot_config_json(config: Pi0Config) -> dict[str, Any]:
    return {
        "type": config.model_type,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "n_obs_steps": 1,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": config.num_steps,
        "image_resolution": [224, 224],
        "tokenizer_max_length": config.max_token_len,
        "min_period": 4e-3,
        "max_period": 4.0,
    }


def _write_processors(directory: Path) -> None:
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    statistics = {
        f"{feature}.{statistic}": torch.full((7,), value)
        for feature in ("observation.state", "action")
        for statistic, value in (("mean", 0.25), ("std", 2.0))
    }
    for processor, step, index in (("preprocessor", "normalizer", 5), ("postprocessor", "unnormalizer", 0)):
        state_file = f"policy_{processor}_step_{index}_{step}_processor.safetensors"
        save_file(statistics, directory / state_file)
        entry = {
            "registry_name": f"{step}_processor",
            "config": {"eps": 1e-8, "features": {}, "norm_map": modes},
            "state_file": state_file,
        }
        text = json.dumps({"name": f"policy_{processor}", "steps": [entry]})
        (directory / f"policy_{processor}.json").write_text(text)


def write_peft(
    directory: Path, base: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None
) -> Path:
    """A PEFT LoRA directory as lerobot saves it. ``tensors`` have PEFT's keys without ``base_model.model.model.``."""
    directory.mkdir(parents=True, exist_ok=True)
    prefixed = {f"base_model.model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(prefixed, directory / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 10,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        **(options or {}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config))
    return directory


def jax_arrays(config: Pi0Config) -> dict[str, np.ndarray]:
    """{path: float32 array} of openpi's JAX model, layers stacked on the first axis."""

    def get(name: str) -> np.ndarray:
        return expected_tensor(name, config).numpy()

    def stack(template: str, depth: int) -> np.ndarray:
        return np.stack([get(template.replace("#", str(layer))) for layer in range(depth)])

    arrays = _jax_vision_arrays(config, get, stack)
    arrays["PaliGemma/llm/embedder/input_embedding"] = get("llm.embed_tokens.weight")
    for tower, suffix, gemma in (("llm", "", config.llm), ("expert", "_1", config.expert)):
        arrays.update(_jax_gemma_arrays(tower, suffix, gemma, adarms=tower == "expert" and config.is_pi05, stack=stack))
    for name in parameter_shapes(config):
        if name.count(".") == 1 and name.endswith(".weight") and not name.startswith(("projector", "llm", "expert")):
            module = name.removesuffix(".weight")
            arrays[f"{module}/kernel"], arrays[f"{module}/bias"] = get(name).T, get(f"{module}.bias")
    return {path: np.ascontiguousarray(array) for path, array in arrays.items()}


def _jax_vision_arrays(config: Pi0Config, get: Any, stack: Any) -> dict[str, np.ndarray]:
    vision, layer, block = config.vision, "vision.layers.#", "PaliGemma/img/Transformer/encoderblock"
    depth, width, heads, head_dim = vision.depth, vision.width, vision.num_heads, vision.head_dim
    arrays = {
        "PaliGemma/img/embedding/kernel": get("vision.patch_embedding.weight").transpose(2, 3, 1, 0),
        "PaliGemma/img/embedding/bias": get("vision.patch_embedding.bias"),
        "PaliGemma/img/pos_embedding": get("vision.position_embedding.weight")[None],
        "PaliGemma/img/Transformer/encoder_norm/scale": get("vision.post_norm.weight"),
        "PaliGemma/img/Transformer/encoder_norm/bias": get("vision.post_norm.bias"),
        "PaliGemma/img/head/kernel": get("projector.weight").T,
        "PaliGemma/img/head/bias": get("projector.bias"),
    }
    for array, name in (("LayerNorm_0", "norm1"), ("LayerNorm_1", "norm2")):
        arrays[f"{block}/{array}/scale"] = stack(f"{layer}.{name}.weight", depth)
        arrays[f"{block}/{array}/bias"] = stack(f"{layer}.{name}.bias", depth)
    for array, name in (("MlpBlock_0/Dense_0", "fc1"), ("MlpBlock_0/Dense_1", "fc2")):
        arrays[f"{block}/{array}/kernel"] = stack(f"{layer}.{name}.weight", depth).transpose(0, 2, 1)
        arrays[f"{block}/{array}/bias"] = stack(f"{layer}.{name}.bias", depth)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for array, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        weights = stack(f"{layer}.{name}.weight", depth).reshape(depth, heads, head_dim, width)
        arrays[f"{attention}/{array}/kernel"] = weights.transpose(0, 3, 1, 2)
        arrays[f"{attention}/{array}/bias"] = stack(f"{layer}.{name}.bias", depth).reshape(depth, heads, head_dim)
    weights = stack(f"{layer}.out_proj.weight", depth).transpose(0, 2, 1)
    arrays[f"{attention}/out/kernel"] = weights.reshape(depth, heads, head_dim, width)
    arrays[f"{attention}/out/bias"] = stack(f"{layer}.out_proj.bias", depth)
    return arrays


def _jax_gemma_arrays(tower: str, suffix: str, gemma: GemmaConfig, adarms: bool, stack: Any) -> dict[str, np.ndarray]:
    llm, layer, depth = "PaliGemma/llm", f"{tower}.layers.#", gemma.depth

    def per_head(name: str, heads: int) -> np.ndarray:  # [heads*H, D] -> [heads, D, H]
        weights = stack(f"{layer}.{name}.weight", depth)
        return weights.reshape(depth, heads, gemma.head_dim, gemma.width).transpose(0, 1, 3, 2)

    def transposed(name: str) -> np.ndarray:
        return stack(f"{layer}.{name}.weight", depth).transpose(0, 2, 1)

    arrays = {
        f"{llm}/layers/attn/q_einsum{suffix}/w": per_head("q_proj", gemma.num_heads),
        f"{llm}/layers/attn/kv_einsum{suffix}/w": np.stack(
            [per_head("k_proj", gemma.num_kv_heads), per_head("v_proj", gemma.num_kv_heads)], axis=1
        ),
        f"{llm}/layers/attn/attn_vec_einsum{suffix}/w": transposed("o_proj").reshape(
            depth, gemma.num_heads, gemma.head_dim, gemma.width
        ),
        f"{llm}/layers/mlp{suffix}/gating_einsum": np.stack([transposed("gate_proj"), transposed("up_proj")], axis=1),
        f"{llm}/layers/mlp{suffix}/linear": transposed("down_proj"),
    }
    norms = {"layers/pre_attention_norm": "layers.#.input_norm", "layers/pre_ffw_norm": "layers.#.post_attention_norm"}
    for array, name in {**norms, "final_norm": "norm"}.items():
        layers = depth if "#" in name else 1
        unstacked = slice(None) if "#" in name else 0
        path, name = f"{llm}/{array}{suffix}", f"{tower}.{name}"
        if adarms:
            arrays[f"{path}/Dense_0/kernel"] = stack(f"{name}.dense.weight", layers).transpose(0, 2, 1)[unstacked]
            arrays[f"{path}/Dense_0/bias"] = stack(f"{name}.dense.bias", layers)[unstacked]
        else:
            arrays[f"{path}/scale"] = stack(f"{name}.weight", layers)[unstacked]
    return arrays


def write_jax(
    directory: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    value: bool = False,
    metadata: Mapping[str, Any] | None = None,
    chunk_limit: int | None = None,
) -> Path:
    """``directory/params`` as orbax writes it: zarr arrays of one zstd chunk each, in an OCDBT store.

    Args:
        value: append ``value`` to every path, as training checkpoints do.
        metadata: overrides of the zarr metadata.
        chunk_limit: the largest size of a chunk along each axis (sharded training writes several chunks).
    """
    import tensorstore

    for path, array in arrays.items():
        chunks = [min(size, chunk_limit or size) for size in array.shape]
        dtype = "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str
        key = ".".join(["params", *path.split("/"), *(["value"] if value else [])])
        spec = {
            "driver": "zarr",
            "context": {"file_io_sync": False},
            "kvstore": {"driver": "ocdbt", "base": f"file://{directory.resolve()}/params/", "path": f"{key}/"},
            "metadata": {
                "shape": list(array.shape),
                "chunks": chunks,
                "dtype": dtype,
                "compressor": {"id": "zstd", "level": 1},
                **(metadata or {}),
            },
        }
        tensorstore.open(spec, create=True).result().write(array).result()
    return directory

"""lerobot's π0 and π0.5 policies on our engine: ``accelerate(policy)``. See docs/lerobot.md.

Only ``policy.model.sample_actions`` is replaced. lerobot's processors, queues, ``select_action``,
``predict_action_chunk`` and ``reset`` stay what they are. Written for lerobot 0.6.1; lerobot itself is not imported
here, the policy that is given brings it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from pi0_engine.checkpoints.checkpoint import Checkpoint
from pi0_engine.checkpoints.safetensors_files import name_tensors
from pi0_engine.checkpoints.stored import StoredTensor
from pi0_engine.config import EngineConfig, GemmaConfig, Pi0Config, SiglipConfig
from pi0_engine.engine.runtime import Engine
from pi0_engine.integrations.lerobot_sampler import Pi0Sampler, Pi05Sampler, Sampler

P = TypeVar("P")

#: lerobot's options that the network's arithmetic depends on, and the only values that this engine computes.
_FIXED = {"min_period": 4e-3, "max_period": 4.0, "n_obs_steps": 1}


def accelerate(
    policy: P, engine_config: EngineConfig | None = None, *, keep_weights: bool = True, progress: bool = False
) -> P:
    """Let a lerobot policy compute its actions with our engine, from the weights that it holds now.

    Args:
        policy: a ``PI0Policy`` or ``PI05Policy`` of lerobot. It is changed in place.
        engine_config: None takes the policy's device and its ``config.dtype``.
        keep_weights: lerobot's own copy of the weights stays, for saving, training and :func:`restore`. False frees it:
            the policy can then do nothing but act.
        progress: show bars while weights are packed and the engine is warmed up.

    Returns:
        The same object.

    Raises:
        ValueError: another policy, weights that are missing, unexpected or misshapen (all of them in one message), or
            an option that the engine does not compute.
    """
    source = LiveCheckpoint(policy)
    install(policy, source, engine_config, progress=progress)
    if keep_weights:
        sampler_of(policy).watch([*_parts(policy)[0].parameters()])
    else:
        source.forget_packed()
        release_weights(policy, _device(policy))
    return policy


def restore(policy: P) -> P:
    """Undo :func:`accelerate`: the policy computes with lerobot's own model again.

    Raises:
        ValueError: a policy that was not accelerated, or one whose weights were not kept.
    """
    if not sampler_of(policy).watched:
        raise ValueError("the policy's own weights were not kept (keep_weights=False): load it again")
    model, _ = _parts(policy)
    del model.sample_actions  # the class's method appears again
    return policy


def sampler_of(policy: object) -> Sampler:
    """What computes an accelerated policy's actions; its ``engine`` is ours.

    Raises:
        ValueError: a policy that was not accelerated.
    """
    sampler = vars(_parts(policy)[0]).get("sample_actions")
    found = getattr(sampler, "sampler", None)
    if not isinstance(found, Sampler):
        raise ValueError(f"this {type(policy).__name__} is not accelerated: call accelerate(policy) first")
    return found


class LiveCheckpoint(Checkpoint):
    """The parameters of a loaded lerobot policy, by canonical name; nothing is copied before it is read.

    Raises:
        ValueError: as :func:`accelerate`.
    """

    def __init__(self, policy: object) -> None:
        config = model_config(policy)
        where = f"{type(policy).__name__}.model"
        tensors = _parts(policy)[0].state_dict()
        stored = name_tensors((_stored(key, tensor) for key, tensor in tensors.items()), where)
        stored.check(config, "the policy's own config")
        shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
        self._live = {name: tensors[tensor.key] for name, tensor in stored.tensors.items()}
        super().__init__(
            config, "lerobot", Path(where), shapes, stored.ignored, lambda name: _on_host(self._live[name])
        )

    def _read_live(self, name: str) -> torch.Tensor:
        return _on_host(self._live[name])

    def forget_packed(self) -> None:
        """Let go of all that an engine has packed. The rest it reads again for each new number of flow steps."""
        packed = re.compile(r"vision\.|projector\.|llm\.|expert\.layers\.\d+\.\w+_proj\.")
        self._live = {name: _on_host(tensor) for name, tensor in self._live.items() if not packed.match(name)}


def model_config(policy: object) -> Pi0Config:
    """The sizes of a lerobot policy's network, as its own configuration objects say them.

    Raises:
        ValueError: another policy, or an option that the engine does not compute.
    """
    model, config = _parts(policy)
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(f"the policy's {name} is {getattr(config, name)!r}; only {value!r} is supported")
    towers = model.paligemma_with_expert
    vision, text = towers.paligemma.config.vision_config, towers.paligemma.config.text_config
    return Pi0Config(
        "pi05" if hasattr(model, "time_mlp_in") else "pi0",
        vision=SiglipConfig(
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_dim=vision.intermediate_size,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        llm=_gemma(text, text.vocab_size),
        expert=_gemma(towers.gemma_expert.config, None),
        action_dim=config.max_action_dim,
        max_token_len=config.tokenizer_max_length,
        action_horizon=config.chunk_size,
        num_steps=config.num_inference_steps,
    )


def install(policy: object, source: Checkpoint, engine_config: EngineConfig | None, *, progress: bool = False) -> None:
    """Build an engine from ``source`` and make ``policy.model.sample_actions`` call it.

    The engine is warmed up for the policy's cameras: what happens once must not happen at the first observation, where
    lerobot's latency tracker would take it for the delay of every chunk.
    """
    model, config = _parts(policy)
    if engine_config is None:
        engine_config = EngineConfig(device=str(_device(policy)), dtype=config.dtype)
    engine = Engine(source, dataclasses.replace(engine_config, flow_times="lerobot"), progress=progress)
    kind = Pi05Sampler if source.config.is_pi05 else Pi0Sampler
    sampler = kind(engine, model)
    views = len(config.image_features) - config.empty_cameras
    if 1 <= views <= 4:
        engine.warm_up(views=views, progress=progress)
    model.sample_actions = sampler.as_function()


def release_weights(policy: object, device: torch.device) -> None:
    """Replace every tensor of the policy by an empty one on ``device``, where lerobot puts the observations.

    What would need them (saving, training) raises a RuntimeError from then on.
    """
    model, _ = _parts(policy)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(0, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(0, dtype=buffer.dtype, device=device))
    model.register_state_dict_pre_hook(_refuse)
    model.forward = _refuse


def _refuse(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("this policy only acts: lerobot's copy of the weights was released when the engine took over")


def _parts(policy: object) -> tuple[Any, Any]:
    """Model and config of a π0 or π0.5 policy."""
    model, config = getattr(policy, "model", None), getattr(policy, "config", None)
    towers = getattr(model, "paligemma_with_expert", None)
    if config is None or not hasattr(towers, "gemma_expert"):
        raise ValueError(
            f"got a {type(policy).__module__}.{type(policy).__qualname__}, expected lerobot's PI0Policy or PI05Policy "
            "(of a PEFT model: policy.merge_and_unload())"
        )
    return model, config


def _device(policy: object) -> torch.device:
    return next(iter(_parts(policy)[0].parameters())).device


def _gemma(config: Any, vocab_size: int | None) -> GemmaConfig:
    return GemmaConfig(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        mlp_dim=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=vocab_size,
    )


def _stored(key: str, tensor: torch.Tensor) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(key, tuple(tensor.shape), dtype, lambda: _on_host(tensor))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu")

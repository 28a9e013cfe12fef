"""lerobot's own π0 and π0.5 at sizes that run in milliseconds, with seeded weights, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import PI0Config, PI0Policy, modeling_pi0
from lerobot.policies.pi05 import PI05Config, PI05Policy, modeling_pi05
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from transformers import GemmaConfig, PaliGemmaConfig

from pi0_engine.checkpoints.names import normalize_key
from pi0_engine.checkpoints.random_weights import random_parameter

IMAGES = "observation.images"
VISION = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "projection_dim": 40,
}
VOCABULARY = 997


def _small_gemma(variant: str) -> modeling_pi0.GemmaConfig:
    width, mlp_dim = {"gemma_2b": (40, 56), "gemma_300m": (28, 44)}[variant]
    return modeling_pi0.GemmaConfig(width, depth=3, mlp_dim=mlp_dim, num_heads=8, num_kv_heads=1, head_dim=16)


def _small_paligemma(config: PaliGemmaConfig) -> PaliGemmaForConditionalGenerationWithPiGemma:
    """lerobot writes published sizes into the vision tower's config; these replace them before the tower is built."""
    for name, value in VISION.items():
        setattr(config.vision_config, name, value)
    config.text_config.vocab_size = VOCABULARY
    return PaliGemmaForConditionalGenerationWithPiGemma(config)


def _small_expert(config: GemmaConfig) -> PiGemmaForCausalLM:
    config.vocab_size = 8  # of an output layer that nobody uses
    return PiGemmaForCausalLM(config)


@contextmanager
def small_sizes() -> Iterator[None]:
    """While this lasts, lerobot builds its policies small. Nothing of what they compute is touched."""
    with ExitStack() as stack:
        for module in (modeling_pi0, modeling_pi05):
            stack.enter_context(patch.object(module, "get_gemma_config", _small_gemma))
            stack.enter_context(patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", _small_paligemma))
            stack.enter_context(patch.object(module, "PiGemmaForCausalLM", _small_expert))
        yield


def small_options(**changes: Any) -> dict[str, Any]:
    """Of lerobot's config: two cameras and a third that is never there, 6 joints, chunks of 16."""
    options = {
        "device": "cpu",
        "image_resolution": (28, 28),
        "chunk_size": 16,
        "n_action_steps": 4,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "num_inference_steps": 4,
        "tokenizer_max_length": 12,
        "push_to_hub": False,
        "input_features": {
            f"{IMAGES}.top": PolicyFeature(FeatureType.VISUAL, (3, 28, 28)),
            f"{IMAGES}.wrist": PolicyFeature(FeatureType.VISUAL, (3, 28, 28)),
            "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
        "empty_cameras": 1,
    }
    return {**copy.deepcopy(options), **changes}


def small_policy(kind: str, **changes: Any) -> Any:
    """A ``PI0Policy`` ("pi0") or ``PI05Policy`` ("pi05") of lerobot in evaluation mode."""
    config_class, policy_class = {"pi0": (PI0Config, PI0Policy), "pi05": (PI05Config, PI05Policy)}[kind]
    with small_sizes():
        policy = policy_class(config_class(**small_options(**changes)))
    seed_weights(policy)
    return policy.eval()


def seed_weights(policy: Any) -> None:
    """Weights with which every part of the network matters; lerobot's initial ones leave most of it near zero."""
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            values = random_parameter(normalize_key(key), parameter.shape)
            parameter.copy_(torch.from_numpy(values))


def random_batch(size: int = 1, *, seed: int = 0, lengths: tuple[int, ...] | None = None, **other: Any) -> dict:
    """What lerobot's preprocessor hands to the policy: frames in [0, 1], normalised state, tokens and their mask."""
    random = torch.Generator().manual_seed(seed)
    filled = torch.tensor(lengths or (7, 4, 12)[:size])
    return {
        f"{IMAGES}.top": torch.rand(size, 3, 28, 28, generator=random),
        f"{IMAGES}.wrist": torch.rand(size, 3, 28, 28, generator=random),
        "observation.state": torch.randn(size, 6, generator=random),
        "observation.language.tokens": torch.randint(0, VOCABULARY, (size, 12), generator=random),
        "observation.language.attention_mask": torch.arange(12) < filled[:, None],
        **other,
    }


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The larger of relative L2 and largest absolute difference."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    difference = actual.double() - expected.double()
    return max(float(difference.norm() / expected.double().norm()), float(difference.abs().max()))

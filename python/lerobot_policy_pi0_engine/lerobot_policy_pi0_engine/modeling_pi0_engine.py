"""lerobot's π0 and π0.5 policies as our engine runs them: loaded straight into the engine, for acting only."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from torch import Tensor

from lerobot_policy_pi0_engine.configuration_pi0_engine import PI0EngineConfig, PI05EngineConfig
from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.config import EngineConfig
from pi0_engine.integrations.lerobot import install, model_config, release_weights


class _EnginePolicy:
    """What both classes add to lerobot's: how they are loaded and saved.

    lerobot's network is built without memory for its weights; the checkpoint is read by the engine alone.
    """

    config_class: type[PreTrainedConfig]
    config: Any
    model: Any
    _files: Path

    def __init__(self, config: PreTrainedConfig, **kwargs: Any) -> None:
        if config.device != "meta":  # set by from_pretrained
            raise ValueError(
                f"{type(self).__name__} has no weights of its own: load a checkpoint (from_pretrained, --policy.path). "
                "To train, take lerobot's own policy type"
            )
        super().__init__(config, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint directory or Hub id of this type or of lerobot's own (``pi0``, ``pi05``).

        Args:
            pretrained_name_or_path: with weights, or with a LoRA adapter, which the engine merges.
            config: None reads the checkpoint's config.json.
            revision: of a Hub id.
            strict: must be true; it is here because lerobot's method has it.
            kwargs: what lerobot's factory knows of the data set; not used.

        Raises:
            ValueError: weights that are missing, unexpected or misshapen, or another policy's config.
        """
        if not strict:
            raise ValueError("strict is False: a network with weights missing is not supported")
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision)
            config.use_peft = False  # merged here, not wrapped around the policy
        config = as_engine_config(config, cls.config_class)
        if config.use_peft:
            raise ValueError(
                "use_peft is set: lerobot would wrap its adapter around a network that does not run. Pass "
                "--policy.use_peft=false: the engine merges the adapter itself"
            )
        device, config.device = config.device, "meta"
        try:
            with torch.device("meta"):
                policy = cls(config)
        finally:
            config.device = device
        checkpoint = open_checkpoint(pretrained_name_or_path, config=model_config(policy), revision=revision)
        engine_config = EngineConfig(device=device, dtype=config.dtype, backend=config.engine_backend)
        install(policy, checkpoint, engine_config)
        release_weights(policy, torch.device(device))
        policy._files = checkpoint.path
        return policy.eval()  # type: ignore[attr-defined]

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The config, and copies of the files that were loaded: an engine's weights do not change."""
        if state_dict is not None:
            raise ValueError("an engine policy saves the files that it was loaded from, no other state_dict")
        self.config._save_pretrained(save_directory)
        for file in sorted(self._files.iterdir()):  # whole, in shards with their index, or an adapter
            if file.name.startswith(("model", "adapter_")) and file.suffix in (".safetensors", ".json"):
                shutil.copy2(file, save_directory)


class PI0EnginePolicy(_EnginePolicy, PI0Policy):
    """π0, policy type ``pi0_engine``."""

    config_class = PI0EngineConfig
    name = "pi0_engine"


class PI05EnginePolicy(_EnginePolicy, PI05Policy):
    """π0.5, policy type ``pi05_engine``."""

    config_class = PI05EngineConfig
    name = "pi05_engine"


def as_engine_config(config: Any, wanted: Any) -> Any:
    """The config itself, or lerobot's own as the ``wanted`` one of our types, with the same values.

    Raises:
        ValueError: the config of another policy.
    """
    if isinstance(config, wanted):
        return config
    theirs = wanted.__base__
    if type(config) is not theirs:
        raise ValueError(f"got a {type(config).__name__}, expected {wanted.__name__} or {theirs.__name__}")
    return wanted(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})

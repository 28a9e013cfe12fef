"""LoRA adapters, merged into the weights in float32: openpi's JAX adapters and PEFT's as lerobot writes them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi0_engine.checkpoints.names import canonical_name, normalize_key
from pi0_engine.checkpoints.safetensors_files import read_tensors
from pi0_engine.checkpoints.stored import WEIGHT_DTYPES, StoredTensor

logger = logging.getLogger(__name__)

#: PEFT options that plain LoRA has, or that do not change what the trained tensors mean. Any other one that is set
#: (use_dora, alpha_pattern, ...) is another method.
_PLAIN_LORA = (
    "peft_type peft_version r lora_alpha use_rslora rank_pattern bias modules_to_save target_modules exclude_modules "
    "layers_to_transform layers_pattern lora_dropout init_lora_weights loftq_config eva_config base_model_name_or_path "
    "revision auto_mapping task_type inference_mode runtime_config ensure_weight_tying megatron_core qalora_group_size"
)
#: Initialisations that also rewrite the base weights, so that the adapter does not fit the published base.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def openpi_delta(lora_a: torch.Tensor, lora_b: torch.Tensor, *, sum_heads: bool) -> torch.Tensor:
    """What an openpi adapter adds to its weight (models/lora.py), in float32.

    Args:
        lora_a: [..., in, rank]; for the attention output [heads, head_dim, rank].
        lora_b: [..., rank, out]; for the attention output [heads, rank, out].
        sum_heads: the attention output contracts heads and head_dim at once: its low-rank activation has no head
            axis left, so every head's ``lora_a`` meets the sum of ``lora_b`` over the heads.

    The scale alpha / rank is 1 in every openpi variant (alpha equals rank; the MLP has no scale at all).
    """
    b = lora_b.float()
    return lora_a.float() @ (b.sum(dim=0, keepdim=True) if sum_heads else b)


@dataclass(frozen=True)
class _LowRank:
    down: StoredTensor  # lora_A [rank, in]
    up: StoredTensor  # lora_B [out, rank]
    scale: float


class PeftAdapter:
    """A PEFT LoRA directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        base: where its base model was when it was trained (a path or a Hub id), or None.
        base_revision: the Hub revision of the base, or None.

    Raises:
        ValueError: damaged files, a method other than plain LoRA, or tensors that do not form pairs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        options = _read_options(directory / "adapter_config.json")
        self.base: str | None = options.get("base_model_name_or_path") or None
        self.base_revision: str | None = options.get("revision") or None
        weights = directory / "adapter_model.safetensors"
        if not weights.is_file():
            raise ValueError(f"{directory} has an adapter_config.json but no adapter_model.safetensors")
        self._low_rank: dict[str, _LowRank] = {}
        self._replaced: dict[str, StoredTensor] = {}
        self._problems: list[str] = []
        self._sort(read_tensors(weights), options)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise one ValueError naming every tensor that does not fit a base of these shapes."""
        problems = list(self._problems)
        for name, pair in self._low_rank.items():
            expected = shapes.get(name)
            found = (*pair.up.shape[:1], *pair.down.shape[1:])
            if expected is None:
                problems.append(f"{pair.down.key}: the base has no {name}")
            elif found != expected or pair.up.shape[1:] != pair.down.shape[:1]:
                problems.append(
                    f"{pair.down.key} {list(pair.down.shape)} and its lora_B {list(pair.up.shape)}: "
                    f"the base weight is {list(expected)}"
                )
        for name, stored in self._replaced.items():
            if stored.shape != shapes.get(name):
                problems.append(f"{stored.key}: {list(stored.shape)}, in the base {shapes.get(name)}")
        if problems:
            lines = [f"{self.directory}: the adapter does not fit its base ({len(problems)} tensors):", *problems]
            raise ValueError("\n    ".join(lines))

    def merge(self, name: str, read_base: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The adapted parameter: float32 where the adapter adds to it, else as the base or the adapter stores it."""
        if name in self._replaced:
            return self._replaced[name].read()
        pair = self._low_rank.get(name)
        if pair is None:
            return read_base(name)
        delta = pair.up.read().float() @ pair.down.read().float()
        return read_base(name).float().add(delta, alpha=pair.scale)

    def _sort(self, tensors: dict[str, StoredTensor], options: dict[str, Any]) -> None:
        halves: dict[str, dict[str, StoredTensor]] = {}
        for key, stored in tensors.items():
            module, kind = _adapter_module(key)
            name = canonical_name(normalize_key(module))
            if name is None or stored.dtype not in WEIGHT_DTYPES:
                self._problems.append(f"{key} ({stored.dtype} {list(stored.shape)}): not a parameter of the model")
            elif kind:
                halves.setdefault(name, {})[kind] = stored
            else:
                self._replaced[name] = stored
        for name, pair in halves.items():
            if set(pair) != {"A", "B"} or any(len(stored.shape) != 2 for stored in pair.values()):
                self._problems.append(f"{name}: expected matrices lora_A and lora_B, found lora_{' lora_'.join(pair)}")
                continue
            rank = pair["A"].shape[0]
            divisor = math.sqrt(rank) if options.get("use_rslora") else rank
            self._low_rank[name] = _LowRank(pair["A"], pair["B"], options["lora_alpha"] / divisor)


def _adapter_module(key: str) -> tuple[str, str]:
    """A PEFT key as (the key of the weight it belongs to, "A" or "B" or "" for a replaced parameter)."""
    key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for kind in ("A", "B"):
        for ending in (f".lora_{kind}.weight", f".lora_{kind}.default.weight"):
            if key.endswith(ending):
                return key.removesuffix(ending) + ".weight", kind
    return key, ""


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_text())
        method, alpha = options["peft_type"], options.get("lora_alpha")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a PEFT adapter's config: {error!r}") from error
    if method != "LORA" or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: peft_type is {method!r} with lora_alpha {alpha!r}, expected 'LORA' and a number")
    unsupported = {name: value for name, value in options.items() if value and name not in _PLAIN_LORA.split()}
    if unsupported:
        raise ValueError(f"{path}: {unsupported} is more than plain LoRA and not supported; merge it with PEFT first")
    initialisation = options.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.startswith(_REWRITES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {initialisation!r}, which changes the base weights as well; "
            "convert the adapter with PEFT first"
        )
    return dict(options)

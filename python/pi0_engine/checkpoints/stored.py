"""What a file holds, whatever its format (``StoredModel``), and the one strict comparison with what the model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch

from pi0_engine.checkpoints.parameters import infer_config, parameter_shapes
from pi0_engine.config import GEMMA_2B, GEMMA_300M, SO400M, GemmaConfig, ModelType, Pi0Config, SiglipConfig

#: The dtypes in which weights are accepted.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
_MAX_NAMES = 20


@dataclass(frozen=True)
class StoredTensor:
    """One parameter as a file holds it; ``read`` gives a tensor of ``shape`` and touches the data for the first time.

    ``key`` is the name in the file and ``dtype`` the file's name of the dtype, lower case.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class StoredModel:
    """The parameters found in a checkpoint.

    Attributes:
        where: the file or directory, for messages.
        tensors: {canonical name: StoredTensor}, in the order that reads the files from front to back.
        ignored: keys that are known and never needed.
        unexpected: keys that are not a part of the model.
        key_of: the name that a canonical parameter has in this format.
    """

    where: str
    tensors: dict[str, StoredTensor]
    ignored: tuple[str, ...]
    unexpected: tuple[str, ...]
    key_of: Callable[[str], str]

    def check_is_pi0(self) -> None:
        """Raise ValueError when this is some other model."""
        present = {name.split(".")[0] for name in self.tensors}
        if {"llm", "expert"} <= present:
            return
        some = [t.key for t in self.tensors.values()][:2] + list(self.unexpected[:3])
        count = len(self.tensors) + len(self.unexpected)
        reason = "no tensor of the language model and none of the action expert"
        if "llm" in present:
            reason = "a language model but no action expert (π0-FAST is such a model, and is not supported)"
        raise ValueError(
            f"{self.where} is not a π0 or π0.5 checkpoint: its {count} tensors hold {reason}. Among them: {some}"
        )

    def infer_config(self) -> Pi0Config:
        """The model's sizes from the tensors alone.

        Raises:
            ValueError: names every missing and unexpected tensor, or the size that the tensors cannot tell.
        """
        expected = _names_by_structure(self.tensors)
        missing = [name for name in expected if name not in self.tensors]
        surplus = [stored.key for name, stored in self.tensors.items() if name not in expected]
        self._raise_if_any(missing, [*surplus, *self.unexpected], misshapen=[], wrong_dtype=[], sizes="")
        try:
            config = infer_config({name: stored.shape for name, stored in self.tensors.items()})
            _check_depths(config)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
        return config

    def check(self, config: Pi0Config, sizes: str) -> None:
        """Raise one ValueError that names all missing, unexpected, misshapen and wrongly typed tensors.

        Args:
            config: the model to compare with.
            sizes: where its sizes come from, for the message.
        """
        expected = parameter_shapes(config)
        missing = [name for name in expected if name not in self.tensors]
        surplus = [stored.key for name, stored in self.tensors.items() if name not in expected]
        misshapen, wrong_dtype = [], []
        for name, stored in self.tensors.items():
            if name in expected and stored.shape != expected[name]:
                misshapen.append(f"{stored.key}: {list(stored.shape)}, expected {list(expected[name])}")
            if stored.dtype not in WEIGHT_DTYPES:
                wrong_dtype.append(f"{stored.key}: {stored.dtype}")
        self._raise_if_any(missing, [*surplus, *self.unexpected], misshapen, wrong_dtype, sizes)

    def _raise_if_any(
        self, missing: list[str], unexpected: list[str], misshapen: list[str], wrong_dtype: list[str], sizes: str
    ) -> None:
        groups = {
            "missing": list(dict.fromkeys(self.key_of(name) for name in missing)),
            "unexpected": unexpected,
            "misshapen": misshapen,
            f"not {', '.join(WEIGHT_DTYPES)}": wrong_dtype,
        }
        if any(groups.values()):
            against = f" (sizes from {sizes})" if sizes else ""
            lines = [f"{self.where}: the tensors are not those of the model{against}"]
            for title, names in groups.items():
                lines += _listing(title, names)
            raise ValueError("\n".join(lines))


def _check_depths(config: Pi0Config) -> None:
    """Refuse a published tower that lacks its last layers: without a config nothing else would show the loss."""
    towers: dict[str, SiglipConfig | GemmaConfig] = {"vision": SO400M, "llm": GEMMA_2B, "expert": GEMMA_300M}
    for tower, published in towers.items():
        found = getattr(config, tower)
        if found != published and dataclasses.replace(found, depth=published.depth) == published:
            raise ValueError(
                f"the tensors have {found.depth} {tower} layers, a tower of these sizes has {published.depth}; "
                "give a config if this is meant"
            )


def _listing(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    lines = [f"  {title} ({len(names)}):", *(f"    {name}" for name in names[:_MAX_NAMES])]
    if len(names) > _MAX_NAMES:
        lines.append(f"    ... and {len(names) - _MAX_NAMES} more")
    return lines


def _names_by_structure(present: Iterable[str]) -> Collection[str]:
    """The parameter names of a model whose depth and model type are those that the present names show."""
    names = set(present)

    def depth(tower: str) -> int:
        layers = [int(n.split(".")[2]) for n in names if n.startswith(f"{tower}.layers.")]
        return 1 + max(layers, default=0)

    is_pi05 = any(n.startswith("time_mlp_in.") for n in names)
    model_type: ModelType = "pi05" if is_pi05 else "pi0"
    gemma_depth = max(depth("llm"), depth("expert"))
    llm = GemmaConfig(8, gemma_depth, 8, 1, 1, head_dim=8, vocab_size=8)
    expert = GemmaConfig(8, gemma_depth, 8, 1, 1, head_dim=8)
    return parameter_shapes(Pi0Config(model_type, SiglipConfig(8, depth("vision"), 1, 8), llm, expert)).keys()

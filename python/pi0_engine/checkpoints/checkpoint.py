"""Open a π0 or π0.5 checkpoint in any published layout as named tensors: strict, and without reading data early.

Layouts: openpi's PyTorch (safetensors) and JAX (orbax) checkpoints, lerobot directories, and PEFT adapters on top of
one of these. See docs/checkpoints.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from pi0_engine.checkpoints.config_files import config_from_json, is_lerobot, read_config_json
from pi0_engine.checkpoints.hub import resolve_source
from pi0_engine.checkpoints.jax import read_orbax
from pi0_engine.checkpoints.lora import PeftAdapter
from pi0_engine.checkpoints.safetensors_files import INDEX_NAME, read_safetensors, weight_files
from pi0_engine.checkpoints.stored import StoredModel
from pi0_engine.config import ModelType, Pi0Config

logger = logging.getLogger(__name__)

CheckpointFormat = Literal["openpi-pytorch", "openpi-jax", "lerobot", "random"]
_Layout = Literal["safetensors", "orbax", "adapter"]
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


class Checkpoint:
    """The complete, checked parameters of one model, read one at a time.

    Attributes:
        config: the model.
        format: the layout that was found.
        path: the directory (or file) that was opened; statistics and tokenizers lie beside the weights in it.
        shapes: {canonical name: shape} of all parameters, in the order in which they are read fastest.
        ignored: tensors of the files that the model does not need.
    """

    def __init__(
        self,
        config: Pi0Config,
        format: CheckpointFormat,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        ignored: tuple[str, ...],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        self.config = config
        self.format = format
        self.path = path
        self.shapes = shapes
        self.ignored = ignored
        self._read = read

    def tensor(self, name: str) -> torch.Tensor:
        """One parameter on the CPU in its stored dtype (float32, bfloat16 or float16); adapted ones are float32.

        From safetensors it is a view of the mapped file: do not write to it, and copy what should stay in memory.
        It may be non-contiguous. Peak memory stays at one parameter when each is copied before the next is asked for.

        Raises:
            ValueError: an unknown name, or damaged data (orbax data is compressed and only seen here).
        """
        if name not in self.shapes:
            raise ValueError(f"no parameter {name!r} in {self.path} (see parameters.parameter_shapes)")
        return self._read(name)


def open_checkpoint(
    source: str | Path,
    *,
    config: Pi0Config | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
) -> Checkpoint:
    """Find, identify and check a checkpoint. Only names and shapes are read; ``Checkpoint.tensor`` reads data.

    Args:
        source: a file, a directory, a Hugging Face Hub id ``owner/name``, or ``gs://...`` in openpi's cache. Of a
            directory of training steps the newest step is taken.
        config: the model's sizes; None takes them from config.json, else from the tensors.
        revision: branch, tag or commit of a Hub id.
        base: for a LoRA adapter, its base checkpoint; None takes what the adapter's config names.

    Raises:
        ValueError: nothing usable there, or tensors that do not match the model (all of them in one message).
    """
    path = resolve_source(source, revision)
    layout, path = _locate(path)
    if layout == "adapter":
        return _open_adapter(path, config, base)
    if base is not None:
        raise ValueError(f"base was given, but {path} is a whole checkpoint, not a LoRA adapter")
    return _open_weights(layout, path, config)


def _open_weights(layout: _Layout, path: Path, config: Pi0Config | None) -> Checkpoint:
    description: dict[str, Any] | None = None
    if layout == "orbax":
        stored = read_orbax(path / "params" if (path / "params").is_dir() else path)
    else:
        files = [path] if path.is_file() else weight_files(path)
        stored = read_safetensors(files, str(path))
        if path.is_dir() and (path / "config.json").is_file():
            description = read_config_json(path / "config.json")
    if config is None and description is not None and is_lerobot(description):
        config_from_json(description, "pi0", path / "config.json")  # another policy's type says more than its tensors
    stored.check_is_pi0()
    config, sizes = _resolve_config(stored, config, description, path)
    stored.check(config, sizes)
    format = _format(layout, stored, description)
    logger.info("opened %s: %s %s, sizes from %s", path, format, config.model_type, sizes)
    if stored.ignored:
        logger.info("%s: not needed by the model and not loaded: %s", path, ", ".join(stored.ignored))
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    return Checkpoint(config, format, path, shapes, stored.ignored, lambda name: stored.tensors[name].read())


def _resolve_config(
    stored: StoredModel, config: Pi0Config | None, description: dict[str, Any] | None, path: Path
) -> tuple[Pi0Config, str]:
    if config is not None:
        return config, "the given config"
    if description is not None:
        model_type: ModelType = "pi05" if any(name.startswith("time_mlp_in.") for name in stored.tensors) else "pi0"
        return config_from_json(description, model_type, path / "config.json"), "config.json"
    return stored.infer_config(), "the tensors"


def _format(layout: _Layout, stored: StoredModel, description: dict[str, Any] | None) -> CheckpointFormat:
    if layout == "orbax":
        return "openpi-jax"
    has_prefix = next(iter(stored.tensors.values())).key.startswith("model.")
    return "lerobot" if has_prefix or (description is not None and is_lerobot(description)) else "openpi-pytorch"


def _open_adapter(path: Path, config: Pi0Config | None, base: str | Path | None) -> Checkpoint:
    adapter = PeftAdapter(path)
    if config is None and (path / "config.json").is_file():
        description = read_config_json(path / "config.json")
        if is_lerobot(description):
            config = config_from_json(description, "pi0", path / "config.json")
    whole = _open_base(adapter, config, base)
    adapter.check(whole.shapes)
    logger.info("%s: LoRA adapter on %s, merged in float32", path, whole.path)
    return Checkpoint(
        whole.config, "lerobot", path, whole.shapes, whole.ignored, lambda name: adapter.merge(name, whole.tensor)
    )


def _open_base(adapter: PeftAdapter, config: Pi0Config | None, base: str | Path | None) -> Checkpoint:
    if base is not None:
        return open_checkpoint(base, config=config)
    if adapter.base is None:
        raise ValueError(f"{adapter.directory} is a LoRA adapter that does not name its base checkpoint: give base")
    try:
        revision = None if Path(adapter.base).exists() else adapter.base_revision
        return open_checkpoint(adapter.base, config=config, revision=revision)
    except ValueError as error:
        raise ValueError(
            f"{adapter.directory} is a LoRA adapter and its base cannot be opened (give base): {error}"
        ) from error


def _locate(path: Path) -> tuple[_Layout, Path]:
    """What lies at a path, and the file or directory that it lies in."""
    if path.name == "model.safetensors" or (path.name == "params" and path.is_dir()):
        path = path.parent  # config.json, assets and processors lie beside it
    if path.is_file():
        return _locate_file(path)
    for directory in _candidates(path):
        layout = _layout(directory)
        if layout is not None:
            if directory != path:
                logger.info("%s: taking %s", path, directory.relative_to(path))
            return layout, directory
    found = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(_PICKLES) for name in found):
        raise ValueError(f"{path} holds weights as pickle files only ({_pickle_advice()}): {found[:10]}")
    raise ValueError(
        f"{path} holds no checkpoint: expected model.safetensors, {INDEX_NAME}, adapter_config.json, "
        f"params/ of an orbax checkpoint, or numbered step directories; found {found[:10] or 'nothing'}"
    )


def _candidates(path: Path) -> Iterator[Path]:
    """The directory itself, lerobot's ``pretrained_model`` in it, and the same in the newest of its steps."""
    steps = [entry for entry in path.iterdir() if entry.is_dir() and entry.name.isdecimal()]
    for directory in [path, *sorted(steps, key=lambda entry: int(entry.name))[-1:]]:
        yield directory
        yield directory / "pretrained_model"


def _layout(directory: Path) -> _Layout | None:
    if (directory / "adapter_config.json").is_file():
        return "adapter"
    if weight_files(directory):
        return "safetensors"
    params = directory / "params"
    if (params / "manifest.ocdbt").is_file() or (directory / "manifest.ocdbt").is_file():
        return "orbax"
    if params.is_dir():
        raise ValueError(f"{params} has no manifest.ocdbt: an incomplete orbax checkpoint, or not in its OCDBT format")
    return None


def _locate_file(path: Path) -> tuple[_Layout, Path]:
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix == ".safetensors":
        return "safetensors", path
    if path.suffix in _PICKLES or start == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        raise ValueError(f"{path} is a pickle file ({_pickle_advice()})")
    raise ValueError(f"{path} is not a checkpoint: expected a .safetensors file or a directory")


def _pickle_advice() -> str:
    return (
        "refused: unpickling runs whatever code the file contains. If you trust it, convert it with torch.load(..., "
        "weights_only=True) and safetensors.torch.save_file"
    )

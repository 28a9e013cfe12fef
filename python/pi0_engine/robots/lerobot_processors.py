"""Normalisation statistics out of lerobot's saved processors.

``policy_preprocessor.json`` and ``policy_postprocessor.json`` list processing steps; the normalising step names its
modes, its features and the safetensors file with the numbers. The file's name holds the step's index, which varies
between lerobot versions, so it is read from the JSON and never guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from pi0_engine.checkpoints.folder import read_json
from pi0_engine.robots.normalization import Normalizer, NormStats, build_with_context

_STATE, _ACTION = "observation.state", "action"
#: lerobot's mode -> the two statistics it reads.
_STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
#: What safetensors calls the types that a statistic may have.
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
#: The step that makes actions relative to the state, under its present name and the one before.
_RELATIVE_STEPS = ("relative_actions_processor", "delta_actions_processor")


def load_lerobot_stats(folder: Path) -> NormStats:
    """The state's normaliser from the preprocessor, the actions' from the postprocessor.

    Raises:
        ValueError: a processor file, its normalising step, the state file or a statistic is missing or malformed.
    """
    pre, post = folder / "policy_preprocessor.json", folder / "policy_postprocessor.json"
    if not post.is_file():
        raise ValueError(f"{folder} has {pre.name} but no {post.name}: actions could not be un-normalised")
    state = _normalizer(pre, "normalizer_processor", "STATE", _STATE)
    actions = _normalizer(post, "unnormalizer_processor", "ACTION", _ACTION)
    return NormStats(state, actions, f"{pre} and {post.name}", _delta_mask(pre, actions.dims))


def _is_file(folder: Path, name: object) -> bool:
    """Whether ``name`` is a file of that folder (and not a path that leads out of it)."""
    return isinstance(name, str) and Path(name).name == name and (folder / name).is_file()


def _steps(path: Path) -> list[dict[str, Any]]:
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path}: 'steps' is missing or not a list of objects")
    return steps


def _normalizer(path: Path, step_name: str, feature_type: str, feature: str) -> Normalizer:
    found = [step for step in _steps(path) if step.get("registry_name") == step_name]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} steps {step_name!r}, expected one")
    settings = found[0].get("config") or {}
    modes = settings.get("norm_map")
    if not isinstance(modes, dict):
        raise ValueError(f"{path}: step {step_name!r} has no 'norm_map'")
    # lerobot treats an absent type, and a state key left out of normalize_observation_keys, as "leave unchanged".
    mode = modes.get(feature_type, "IDENTITY")
    selected = settings.get("normalize_observation_keys")
    if mode == "IDENTITY" or (feature_type == "STATE" and selected is not None and feature not in selected):
        return Normalizer.identity()
    if mode not in _STATISTICS:
        raise ValueError(f"{path}: mode of {feature_type} is {mode!r}, expected IDENTITY or one of {list(_STATISTICS)}")
    state_file = found[0].get("state_file")
    if not _is_file(path.parent, state_file):
        # lerobot would run on without normalising here.
        raise ValueError(
            f"{path}: step {step_name!r} declares {mode} but its statistics are missing "
            f"(state_file is {state_file!r}; a base model to be fine-tuned is saved without). "
            "NormStats.identity() says that none are wanted"
        )
    file = path.parent / str(state_file)
    values, keys = _read_state(file), [f"{feature}.{key}" for key in _STATISTICS[mode]]
    if any(key not in values for key in keys):
        raise ValueError(f"{file} lacks some of {keys}, which mode {mode} needs; it has {sorted(values)}")
    pair = [values[key] for key in keys]
    where, eps = f"{file}: {feature}", float(settings.get("eps", 1e-8))
    if mode == "MEAN_STD":
        return build_with_context(where, Normalizer.zscore, *pair, flavour="lerobot", eps=eps)
    if mode == "MIN_MAX":
        return build_with_context(where, Normalizer.minmax, *pair, eps=eps)
    return build_with_context(where, Normalizer.quantile, *pair, flavour="lerobot", eps=eps)


def _read_state(path: Path) -> dict[str, NDArray[np.float32]]:
    """A few vectors: read as they are, not by torch, which a robot's side does without."""
    try:
        stored = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return {name: _float32(f"{path}: {name}", **tensor) for name, tensor in stored}


def _float32(where: str, shape: list[int], dtype: str, data: bytes) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32, which numpy has no name for
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise ValueError(f"{where} is {dtype}, expected one of {['BF16', *_DTYPES]}")
    return np.frombuffer(data, _DTYPES[dtype]).astype(np.float32).reshape(shape)


def _delta_mask(path: Path, dims: int) -> tuple[bool, ...] | None:
    """Which action dimensions are relative (lerobot ``processor/relative_action_processor.py``); None if not said.

    A dimension stays absolute when its name contains one of the excluded names, letter case ignored.
    ``dims`` is how many actions the statistics cover.
    """
    found = [step for step in _steps(path) if step.get("registry_name") in _RELATIVE_STEPS]
    if not found:
        return None
    settings = found[0].get("config") or {}
    if not settings.get("enabled", False):
        return (False,) * dims
    if dims == 0:
        raise ValueError(f"{path} makes actions relative, but without action statistics their number is unknown")
    excluded = [str(name).lower() for name in settings.get("exclude_joints") or [] if name]
    names = [str(name).lower() for name in settings.get("action_names") or []]
    # Dimensions without a name are relative.
    names += [""] * (dims - len(names))
    return tuple(not any(part in name for part in excluded) for name in names[:dims])

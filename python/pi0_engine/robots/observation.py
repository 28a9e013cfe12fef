"""One observation as a robot sends it -> its frames, state and instruction, every value checked.

Each error names the key, what was given and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.images.resize import MAX_SIDE
from pi0_engine.robots.declaration import Camera, Robot, StatePart

#: How far a float pixel may leave [0, 1] by rounding; less than the step to the next of 256 values.
_PIXEL_SLACK = 1e-3


class ObservationError(ValueError):
    """An observation that cannot be used: the fault is its sender's, not the policy's."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What a robot said.

    Attributes:
        frames: uint8 [H, W, 3] per camera slot; absent cameras are not in it.
        state: float64 [state_dim], in robot units.
        prompt: the instruction.
    """

    frames: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float64]
    prompt: str


def read_observation(observation: Mapping[str, Any], robot: Robot, prompt: str | bytes | None = None) -> Observation:
    """Read an observation by the robot's declaration.

    A key ``a/b`` is found as itself or nested as ``{"a": {"b": ...}}``. The instruction is ``prompt``, else the
    observation's, else the robot's. Keys that are not declared are ignored, unless their value is an image.

    Raises:
        ValueError: a required key is missing; an image under an undeclared key; a value of the wrong kind, dtype,
            shape or range; NaN or infinity in the state; no instruction.
    """
    if not isinstance(observation, Mapping):
        raise ValueError(f"the observation is {type(observation).__name__}, expected a dict of named values")
    values = _flatten(observation)
    _refuse_unknown_cameras(values, robot)
    frames = {}
    for camera in robot.cameras:
        if camera.slot is not None and camera.key in values:
            frames[camera.slot] = _frame(values[camera.key], camera)
        elif camera.required:
            raise ValueError(_missing(camera.key, values, robot))
    parts = []
    for part in robot.state:
        if part.key not in values:
            raise ValueError(_missing(part.key, values, robot))
        parts.append(_numbers(values[part.key], part))
    given = prompt if prompt is not None else values.get(robot.prompt_key, robot.prompt)
    if given is None:
        raise ValueError(_missing(robot.prompt_key, values, robot) + "; there is no default instruction either")
    return Observation(frames, np.concatenate(parts), read_prompt(given, robot.prompt_key))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        found = _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        for twice in found.keys() & out.keys():
            raise ValueError(f"observation key {twice!r} is there twice: nested, and as one key with a slash")
        out.update(found)
    return out


def _missing(key: str, values: Mapping[str, Any], robot: Robot) -> str:
    given = sorted(values)
    more = f" and {len(given) - 32} more" if len(given) > 32 else ""
    return f"observation key {key!r} is missing; robot {robot.name!r} expects it, given were {given[:32]}{more}"


def _refuse_unknown_cameras(values: Mapping[str, Any], robot: Robot) -> None:
    """A mistyped optional camera would otherwise silently be a masked one."""
    known = {camera.key for camera in robot.cameras} | {part.key for part in robot.state} | {robot.prompt_key}
    for key, value in values.items():
        if key not in known and getattr(value, "ndim", 0) >= 3:
            cameras = [camera.key for camera in robot.cameras]
            raise ValueError(
                f"observation key {key!r} holds an image, but robot {robot.name!r} has cameras {cameras}; "
                "to accept and ignore a camera, declare it with slot null"
            )


def _frame(value: Any, camera: Camera) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]; a float image in [0, 1] is scaled and truncated as in openpi ``policies/droid_policy.py``."""
    where = f"observation key {camera.key!r}"
    image = _array(value, where, "an image")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"{where} is {image.dtype} {list(image.shape)}, expected an image, uint8 or float in [0, 1]")
    first = image.ndim == 3 and image.shape[0] == 3
    last = image.ndim == 3 and image.shape[2] == 3
    if camera.layout == "any" and first and last:
        raise ValueError(f"{where} has shape {list(image.shape)}: its colour axis is ambiguous, declare hwc or chw")
    is_chw = camera.layout == "chw" or (camera.layout == "any" and first)
    if not (first if is_chw else last) or image.size == 0:
        expected = {"chw": "[3, H, W]", "hwc": "[H, W, 3]", "any": "[H, W, 3] or [3, H, W]"}[camera.layout]
        hint = f" (layout {camera.layout!r} is declared)" if first or last else ""
        raise ValueError(f"{where} has shape {list(image.shape)}, expected {expected}{hint}")
    if max(image.shape) > MAX_SIDE:
        raise ValueError(f"{where} has shape {list(image.shape)}, expected sides of at most {MAX_SIDE} pixels")
    if image.dtype != np.uint8:
        low, high = image.min(), image.max()
        if not (low >= -_PIXEL_SLACK and high <= 1 + _PIXEL_SLACK):
            raise ValueError(f"{where} is a float image from {low} to {high}, expected 0 to 1")
        image = (255 * image).astype(np.uint8)
    return image.transpose(1, 2, 0) if is_chw else image


def _array(value: Any, where: str, expected: str) -> NDArray[Any]:
    """As numpy makes it, except of lists with text: there the longest entry would set the size of all."""
    if isinstance(value, (list, tuple)) and _holds_text(value):
        raise ValueError(f"{where} is a list that holds text, expected {expected}")
    return np.asarray(value)


def _holds_text(values: list[Any] | tuple[Any, ...]) -> bool:
    return any(
        _holds_text(value) if isinstance(value, (list, tuple)) else isinstance(value, (str, bytes)) for value in values
    )


def _numbers(value: Any, part: StatePart) -> NDArray[np.float64]:
    where = f"observation key {part.key!r}"
    numbers = _array(value, where, f"{part.size} real numbers")
    if not (np.issubdtype(numbers.dtype, np.floating) or np.issubdtype(numbers.dtype, np.integer)):
        raise ValueError(f"{where} is {numbers.dtype}, expected {part.size} real numbers")
    if part.size == 1 and numbers.ndim == 0:
        numbers = numbers[None]
    if numbers.shape != (part.size,):
        raise ValueError(f"{where} has shape {list(numbers.shape)}, expected [{part.size}]")
    numbers = numbers.astype(np.float64)
    if not np.isfinite(numbers).all():
        index = int(np.argmin(np.isfinite(numbers)))
        raise ValueError(f"{where} is {numbers[index]} at index {index}, expected finite numbers")
    return numbers


def read_prompt(value: Any, key: str = "prompt") -> str:
    """An instruction: text, or UTF-8 bytes, or a numpy array of one of them. Raises ValueError naming ``key``."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"observation key {key!r} holds bytes that are not UTF-8: {error}") from error
    if not isinstance(value, str):
        raise ValueError(f"observation key {key!r} is {type(value).__name__}, expected text")
    return str(value)

"""What a robot says and what it obeys: cameras, state and actions, declared as data.

A :class:`Robot` names the observation's keys, where each camera goes, and how joint and gripper values are mapped to
the space a checkpoint was trained in. The built-in robots are YAML files in ``data/robots``; a user's own is one more
such file (docs/robots.md). Facts of the built-in ones: openpi ``policies/*_policy.py`` and ``training/config.py``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.robots.guards import Guards

Layout = Literal["hwc", "chw", "any"]
FloatArray = NDArray[np.floating[Any]]

#: Views a prefix may hold.
MAX_SLOTS = 4


@dataclass(frozen=True)
class Camera:
    """One camera of the observation.

    Attributes:
        key: where its frame is; ``images/cam_high`` is also found in a nested ``{"images": {"cam_high": ...}}``.
        slot: the model's camera slot; None accepts the frame and ignores it.
        required: whether an observation without it is an error; otherwise its slot is masked.
        layout: ``hwc``, ``chw``, or ``any``: the axis of length 3, first or last, is the colour.
    """

    key: str
    slot: str | None
    required: bool = True
    layout: Layout = "hwc"


@dataclass(frozen=True)
class StatePart:
    """``size`` numbers under one key of the observation. A part of size 1 may also come as a scalar."""

    key: str
    size: int


@dataclass(frozen=True)
class RangeMap:
    """Linear: the robot's range goes to the model's range and beyond it, unclipped. ``[-1, 1] -> [1, -1]`` flips."""

    dims: tuple[int, ...]
    robot: tuple[float, float]
    model: tuple[float, float]

    def __post_init__(self) -> None:
        for name, values in (("robot", self.robot), ("model", self.model)):
            if len(values) != 2 or not np.isfinite(values).all() or values[0] == values[1]:
                raise ValueError(f"map of dims {list(self.dims)}: {name} is {values}, expected two different numbers")

    @property
    def scale_and_offset(self) -> tuple[float, float]:
        """model = robot * scale + offset."""
        scale = (self.model[1] - self.model[0]) / (self.robot[1] - self.robot[0])
        return scale, self.model[0] - scale * self.robot[0]

    def to_model(self, values: FloatArray) -> FloatArray:
        scale, offset = self.scale_and_offset
        return values * scale + offset


@dataclass(frozen=True)
class AlohaGripper:
    """ALOHA's measured gripper opening (0 closed, 1 open, linear in the fingers' distance) to π0's gripper angle.

    The opening becomes metres between the finger positions 0.01844 and 0.05800, then the angle of the servo horn
    (radius 0.022 m) that drives the fingers through an arm of 0.036 m, then a fraction of the angles
    0.5476..1.6296 rad that π0's training data spans. State only: actions are already angles.
    """

    dims: tuple[int, ...]

    def to_model(self, values: FloatArray) -> FloatArray:
        arm, horn = 0.036, 0.022
        position = values * (0.05800 - 0.01844) + 0.01844
        # The law of cosines in the triangle horn, arm, position; the angle is measured from the perpendicular.
        sine = (horn**2 + position**2 - arm**2) / (2 * horn * position)
        return (np.arcsin(np.clip(sine, -1.0, 1.0)) - 0.5476) / (1.6296 - 0.5476)


StateMap = RangeMap | AlohaGripper


@dataclass(frozen=True)
class Robot:
    """The declaration of a robot.

    Attributes:
        name: for messages.
        cameras: the frames it sends.
        state: the parts whose concatenation is the state, in order.
        action_dim: numbers in one of its actions.
        slots: camera slots in the order of the prefix, 1 to 4; a slot that no camera feeds is always masked.
        state_maps, action_maps: robot units to model units, per dimension.
        delta_mask: action dimensions that the model gives relative to the state (of the same index, after its map).
            May be shorter than ``action_dim``: the rest is absolute.
        prompt: instruction where the observation has none.
        prompt_key: key of the instruction.
        action_horizon: actions per chunk in the released checkpoints, per model type, where known.
        discrete_state_input: whether π0.5's prompt holds the state, where the released checkpoint differs from π0.5.
        control_hz: actions that the robot executes per second, where known.
        guards: limits of its actions; None refuses NaN and infinity only.

    Raises:
        ValueError: anything inconsistent, naming it.
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[StatePart, ...]
    action_dim: int
    slots: tuple[str, ...]
    state_maps: tuple[StateMap, ...] = ()
    action_maps: tuple[RangeMap, ...] = ()
    delta_mask: tuple[bool, ...] = ()
    prompt: str | None = None
    prompt_key: str = "prompt"
    action_horizon: Mapping[ModelType, int] = field(default_factory=dict)
    discrete_state_input: bool | None = None
    control_hz: float | None = None
    guards: Guards | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def state_dim(self) -> int:
        """Numbers in the state."""
        return sum(part.size for part in self.state)

    def configure(self, config: Pi0Config) -> Pi0Config:
        """``config`` with the horizon and prompt format of this robot's released checkpoints.

        openpi's checkpoints do not record either. Use it only where the checkpoint says nothing.
        """
        changes: dict[str, Any] = {}
        if config.model_type in self.action_horizon:
            changes["action_horizon"] = self.action_horizon[config.model_type]
        if config.is_pi05 and self.discrete_state_input is not None:
            changes["discrete_state_input"] = self.discrete_state_input
        return dataclasses.replace(config, **changes)

    def state_to_model(self, state: FloatArray) -> FloatArray:
        """[..., state_dim] in robot units -> the same in model units, not yet normalised."""
        return _apply(state, ((mapping.dims, mapping.to_model) for mapping in self.state_maps))

    def actions_to_model(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """[..., H, action_dim] in robot units -> model units, relative to ``state`` [..., state_dim] (model units)."""
        scale, offset = self._action_map
        return actions * scale + offset - self._delta_offset(state)

    def actions_to_robot(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """[..., H, action_dim] in model units, not normalised -> robot units: the inverse of ``actions_to_model``."""
        scale, offset = self._action_map
        return (actions + self._delta_offset(state) - offset) / scale

    @functools.cached_property
    def _action_map(self) -> tuple[FloatArray, FloatArray]:
        """All ``action_maps`` at once, [action_dim] each: the model's number is the robot's times scale plus offset."""
        scale, offset = np.ones(self.action_dim), np.zeros(self.action_dim)
        for mapping in self.action_maps:
            dims = list(mapping.dims)
            scale[dims], offset[dims] = mapping.scale_and_offset
        return scale, offset

    @functools.cached_property
    def _delta_dims(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.delta_mask)

    def _delta_offset(self, state: FloatArray) -> FloatArray:
        """What to add to relative actions: [..., 1, action_dim]."""
        offset = np.zeros((*state.shape[:-1], 1, self.action_dim), state.dtype)
        offset[..., 0, self._delta_dims] = state[..., self._delta_dims]
        return offset


def bool_mask(counts: Iterable[int]) -> tuple[bool, ...]:
    """openpi's short form of a mask: ``[6, -1]`` is six times True, then once False."""
    return tuple(value > 0 for value in counts for _ in range(abs(value)))


def _apply(values: FloatArray, maps: Iterable[tuple[tuple[int, ...], Any]]) -> FloatArray:
    out = values.copy()
    for dims, function in maps:
        out[..., list(dims)] = function(values[..., list(dims)])
    return out


def _check(robot: Robot) -> None:
    where = f"robot {robot.name!r}"
    used = [camera.slot for camera in robot.cameras if camera.slot is not None]
    if not used:
        raise ValueError(f"{where} has no camera that feeds a slot")
    if not 1 <= len(robot.slots) <= MAX_SLOTS:
        raise ValueError(f"{where} has {len(robot.slots)} slots, expected 1 to {MAX_SLOTS}")
    for camera in robot.cameras:
        if camera.slot is not None and camera.slot not in robot.slots:
            raise ValueError(f"{where}: camera {camera.key!r} feeds {camera.slot!r}, expected one of {robot.slots}")
        if camera.layout not in get_args(Layout):
            raise ValueError(f"{where}: layout of {camera.key!r} is {camera.layout!r}, expected {get_args(Layout)}")
    keys = [camera.key for camera in robot.cameras] + [part.key for part in robot.state] + [robot.prompt_key]
    for what, names in (("slots are listed", robot.slots), ("slots are fed", used), ("keys are used", keys)):
        if len(set(names)) != len(names):
            raise ValueError(f"{where}: some {what} twice: {sorted(name for name in names if names.count(name) > 1)}")
    if not robot.state or any(part.size < 1 for part in robot.state):
        raise ValueError(f"{where}: state is {robot.state}, expected parts with a size of at least 1")
    if robot.action_dim < 1:
        raise ValueError(f"{where}: action_dim is {robot.action_dim}, expected at least 1")
    _check_dims(f"{where}: state maps", robot.state_maps, robot.state_dim)
    _check_dims(f"{where}: action maps", robot.action_maps, robot.action_dim)
    if len(robot.delta_mask) > robot.action_dim:
        raise ValueError(f"{where}: delta mask covers {len(robot.delta_mask)} dimensions of {robot.action_dim} actions")
    if any(robot.delta_mask[robot.state_dim :]):
        raise ValueError(f"{where}: delta mask covers action dimensions beyond the {robot.state_dim} of the state")
    for model_type, horizon in robot.action_horizon.items():
        if model_type not in get_args(ModelType) or horizon < 1:
            raise ValueError(f"{where}: action_horizon has {model_type!r}: {horizon}, expected pi0 or pi05: at least 1")
    if robot.control_hz is not None and not (np.isfinite(robot.control_hz) and robot.control_hz > 0):
        raise ValueError(f"{where}: control_hz is {robot.control_hz!r}, expected actions per second, above 0")
    if robot.guards is not None:
        try:
            robot.guards.validate(robot.action_dim, robot.state_dim, robot.control_hz)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _check_dims(where: str, maps: Sequence[StateMap], size: int) -> None:
    dims = [dim for mapping in maps for dim in mapping.dims]
    if any(not 0 <= dim < size for dim in dims):
        raise ValueError(f"{where} name dimensions {dims}, expected 0..{size - 1}")
    if len(set(dims)) != len(dims):
        raise ValueError(f"{where} name a dimension twice: {dims}")

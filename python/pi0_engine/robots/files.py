"""Robots from YAML or JSON: a strict schema, so that a mistyped key is an error and not a default (docs/robots.md)."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pi0_engine.config import ModelType
from pi0_engine.robots.declaration import AlohaGripper, Camera, RangeMap, Robot, StateMap, StatePart, bool_mask
from pi0_engine.robots.guards import Guards

_FOLDER = Path(__file__).parent.parent / "data" / "robots"

#: openpi's config names -> built-in robots with the same inputs and outputs.
OPENPI_NAMES = {
    "pi0_aloha": "aloha",
    "pi05_aloha": "aloha",
    "pi0_aloha_sim": "aloha_sim",
    "pi0_droid": "droid",
    "pi05_droid": "droid",
    "pi0_libero": "libero_delta",
    "pi05_libero": "libero",
}


def robot_names() -> tuple[str, ...]:
    """The built-in robots."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def get_robot(source: str | Path | Robot) -> Robot:
    """A built-in robot by name (``aloha``, ``droid``, ``libero``, ...), or one declared in a YAML or JSON file.

    openpi's config names are known too. A :class:`Robot` is returned as it is.

    Raises:
        ValueError: no such name or file, or a declaration that is wrong, naming the key and the file.
    """
    if isinstance(source, Robot):
        return source
    path = _locate(source)
    data = _merged(path, [])
    try:
        return _robot(_Section(data, "", path))
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _locate(source: str | Path) -> Path:
    name = OPENPI_NAMES.get(str(source), str(source))
    if name in robot_names():
        return _FOLDER / f"{name}.yaml"
    path = Path(source)
    if path.suffix in (".yaml", ".yml", ".json"):
        if path.is_file():
            return path
        raise ValueError(f"robot file {path} does not exist")
    known = [*robot_names(), *OPENPI_NAMES]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"robot {name!r} is none of {known}, nor a .yaml or .json file{hint}")


def _merged(path: Path, above: list[Path]) -> dict[str, Any]:
    """The file's content over that of the robot it ``extends``.

    ``state``, ``actions`` and ``guards`` are merged key by key.
    """
    if path.resolve() in above:
        raise ValueError(f"{path} extends itself")
    # Here: YAML takes 25 ms to import, and the client, which imports this module, reads no file.
    from pi0_engine.robots.strict_yaml import read_yaml

    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, expected keys and values")
    parent = data.pop("extends", None)
    if parent is None:
        return {"name": path.stem, **data}
    beside = path.parent / str(parent)
    base = _merged(beside if beside.is_file() else _locate(str(parent)), [*above, path.resolve()])
    for section in ("state", "actions", "guards"):
        if isinstance(base.get(section), dict) and isinstance(data.get(section), dict):
            data[section] = {**base[section], **data[section]}
    return {**base, "name": path.stem, **data}


Kinds = type | tuple[type, ...]
_KIND_NAMES = {
    dict: "keys with values", list: "a list", str: "text", int: "a whole number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


class _Section:
    """Part of a file, read key by key; :meth:`done` refuses keys that nobody asked for."""

    def __init__(self, data: Any, name: str, path: Path) -> None:
        self.name, self.path, self._asked = name, path, set[str]()
        self.data: dict[str, Any] = self._typed(data, dict, name or "the file")

    def _typed(self, value: Any, kinds: Kinds, key: str) -> Any:
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        # bool is an int in Python, never in a declaration.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(_KIND_NAMES[kind] for kind in kinds)
            raise ValueError(f"{self.path}: {key} is {value!r}, expected {expected}")
        return value

    def key(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def get(self, name: str, kinds: Kinds, default: Any = ...) -> Any:
        """The value of a key, of one type; without a default the key must be there."""
        self._asked.add(name)
        if name in self.data:
            return self._typed(self.data[name], kinds, self.key(name))
        if default is ...:
            raise ValueError(f"{self.path}: {self.key(name)} is missing")
        return default

    def items(self, name: str, kinds: Kinds, default: Any = ...) -> tuple[Any, ...]:
        """A list whose entries have one type."""
        values = self.get(name, list, default)
        return tuple(self._typed(v, kinds, f"{self.key(name)}[{i}]") for i, v in enumerate(values))

    def section(self, name: str, data: Any = ...) -> _Section:
        return _Section(self.get(name, dict) if data is ... else data, self.key(name), self.path)

    def done(self) -> None:
        unknown = sorted(map(str, set(self.data) - self._asked))
        if unknown:
            where = f" in {self.name}" if self.name else ""
            raise ValueError(f"{self.path}: unknown keys {unknown}{where}, expected some of {sorted(self._asked)}")


def _robot(root: _Section) -> Robot:
    cameras = root.section("cameras")
    frames = tuple(_camera(key, cameras.section(str(key), value)) for key, value in cameras.data.items())
    fed = list(dict.fromkeys(camera.slot for camera in frames if camera.slot is not None))
    state, actions = root.section("state"), root.section("actions")
    keys = state.section("keys")
    robot = Robot(
        name=root.get("name", str),
        cameras=frames,
        state=tuple(StatePart(str(key), keys.get(key, int)) for key in keys.data),
        action_dim=actions.get("dim", int),
        slots=root.items("slots", str, fed),
        state_maps=tuple(_map(state.section(f"maps[{i}]", m)) for i, m in enumerate(state.items("maps", dict, []))),
        action_maps=tuple(_action_map(actions, i, m) for i, m in enumerate(actions.items("maps", dict, []))),
        delta_mask=bool_mask(actions.items("delta", int, [])),
        prompt=root.get("prompt", (str, type(None)), None),
        prompt_key=root.get("prompt_key", str, "prompt"),
        action_horizon=_horizons(root.get("action_horizon", (int, dict), {}), root),
        discrete_state_input=root.get("discrete_state_input", (bool, type(None)), None),
        control_hz=root.get("control_hz", (int, float, type(None)), None),
        guards=_guards(root, actions.get("dim", int)),
    )
    for section in (root, state, actions):
        section.done()
    return robot


def _camera(key: Any, section: _Section) -> Camera:
    camera = Camera(
        key=str(key),
        slot=section.get("slot", (str, type(None))),
        required=section.get("required", bool, section.data.get("slot") is not None),
        layout=section.get("layout", str, "hwc"),
    )
    section.done()
    return camera


def _map(section: _Section) -> StateMap:
    dims = section.items("dims", int)
    if section.get("kind", str, "range") == "aloha_gripper":
        section.done()
        return AlohaGripper(dims)
    if section.data.get("kind", "range") != "range":
        where = f"{section.path}: {section.key('kind')}"
        raise ValueError(f"{where} is {section.data['kind']!r}, expected 'range' or 'aloha_gripper'")
    robot, model = section.items("robot", (int, float)), section.items("model", (int, float))
    section.done()
    return RangeMap(dims, robot, model)  # which checks the lengths itself


def _action_map(actions: _Section, index: int, data: Any) -> RangeMap:
    section = actions.section(f"maps[{index}]", data)
    result = _map(section)
    if not isinstance(result, RangeMap):
        raise ValueError(f"{section.path}: {section.key('kind')} maps the state only, expected 'range' for actions")
    return result


def _horizons(value: int | Mapping[Any, Any], root: _Section) -> dict[ModelType, int]:
    if isinstance(value, int):
        return {model_type: value for model_type in get_args(ModelType)}
    section = root.section("action_horizon", value)
    horizons = {key: section.get(key, int) for key in get_args(ModelType) if key in section.data}
    section.done()
    return horizons


def _guards(root: _Section, action_dim: int) -> Guards | None:
    if root.get("guards", (dict, type(None)), None) is None:
        return None
    section = root.section("guards")
    declared: dict[str, Any] = {
        "on_violation": section.get("on_violation", str, "refuse"),
        "limits": _limits(section, action_dim),
        "max_velocity": _per_dim(section, "max_velocity", action_dim),
        "max_jump": _per_dim(section, "max_jump", action_dim),
        "max_observation_age_ms": section.get("max_observation_age_ms", (int, float, type(None)), None),
    }
    section.done()
    return Guards(**declared)


def _per_dim(section: _Section, name: str, action_dim: int) -> tuple[float | None, ...] | None:
    """A number for every action dimension, or a list with one entry (or null) for each."""
    value = section.get(name, (int, float, list, type(None)), None)
    if isinstance(value, list):
        return section.items(name, (int, float, type(None)))
    return None if value is None else (value,) * action_dim


def _limits(section: _Section, action_dim: int) -> tuple[tuple[float, float] | None, ...] | None:
    """``[low, high]`` for every action dimension, or a list with one such pair (or null) for each."""
    value = section.get("limits", (list, type(None)), None)
    if value is None:
        return None
    if value and all(isinstance(entry, (int, float)) for entry in value):
        return (section.items("limits", (int, float)),) * action_dim  # Guards checks that it is a pair
    pairs = section.items("limits", (list, type(None)))
    entries = {f"limits[{i}]": pair for i, pair in enumerate(pairs) if pair is not None}
    nested = _Section(entries, section.name, section.path)
    numbers = {name: nested.items(name, (int, float)) for name in entries}
    return tuple(numbers.get(f"limits[{i}]") for i in range(len(pairs)))


def declaration(robot: Robot) -> dict[str, Any]:
    """A robot as the content of a robot file, in full: JSON values from which :func:`parse_robot` makes it again."""
    delta = [(1 if relative else -1) * len(list(run)) for relative, run in itertools.groupby(robot.delta_mask)]
    return {
        "name": robot.name,
        "slots": list(robot.slots),
        "cameras": {c.key: {"slot": c.slot, "required": c.required, "layout": c.layout} for c in robot.cameras},
        "state": {
            "keys": {part.key: part.size for part in robot.state},
            "maps": [_declared_map(mapping) for mapping in robot.state_maps],
        },
        "actions": {
            "dim": robot.action_dim,
            "delta": delta,
            "maps": [_declared_map(mapping) for mapping in robot.action_maps],
        },
        "prompt": robot.prompt,
        "prompt_key": robot.prompt_key,
        "action_horizon": dict(robot.action_horizon),
        "discrete_state_input": robot.discrete_state_input,
        "control_hz": robot.control_hz,
        "guards": None if robot.guards is None else robot.guards.to_dict(),
    }


def parse_robot(data: Any, where: str | Path) -> Robot:
    """The robot of a :func:`declaration`; ``where`` it was found is for messages. Raises ValueError."""
    return _robot(_Section(data, "", Path(where)))


def _declared_map(mapping: StateMap) -> dict[str, Any]:
    if isinstance(mapping, AlohaGripper):
        return {"dims": list(mapping.dims), "kind": "aloha_gripper"}
    return {"dims": list(mapping.dims), "robot": list(mapping.robot), "model": list(mapping.model)}

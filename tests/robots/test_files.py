from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_engine.config import CAMERA_SLOTS, Pi0Config
from pi0_engine.robots.declaration import Camera, RangeMap, Robot, StatePart, bool_mask
from pi0_engine.robots.files import OPENPI_NAMES, get_robot, robot_names
from pi0_engine.robots.guards import Guards
from tests.support.paths import DATA, ROOT

DOCS = ROOT / "docs" / "robots.md"
SAFETY = DOCS.with_name("safety.md")


# --- ALOHA's numbers, worked out by hand --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opening", "expected"),
    [
        # position 0.01844 m: sine (0.022^2 + 0.01844^2 - 0.036^2) / (2 * 0.022 * 0.01844) = -0.581698,
        # angle -0.620815 rad, (-0.620815 - 0.5476) / 1.082
        (0.0, -1.0798655),
        # position 0.03822 m: sine 0.385786, angle 0.396059 rad
        (0.5, -0.1400559),
        # position 0.058 = 0.022 + 0.036 m: the linkage is stretched, a right angle; (pi / 2 - 0.5476) / 1.082
        (1.0, (math.pi / 2 - 0.5476) / 1.082),
        # Further is impossible: the sine is held at 1.
        (1.1, (math.pi / 2 - 0.5476) / 1.082),
    ],
)
def test_aloha_gripper_opening_to_angle(opening: float, expected: float) -> None:
    aloha = get_robot("aloha")
    state = np.zeros(14)
    state[[6, 13]] = opening
    np.testing.assert_allclose(aloha.state_to_model(state)[[6, 13]], expected, atol=1e-7)


@pytest.mark.parametrize(("angle", "command"), [(0.0, 0.5533778), (0.5, 0.7900866), (1.0, 1.0267954), (-1.1689, 0.0)])
def test_aloha_gripper_angle_to_command(angle: float, command: float) -> None:
    # (angle + 0.5476 + 0.6213) / (1.4910 + 0.6213)
    actions = np.zeros((1, 14))
    actions[0, [6, 13]] = angle
    aloha = get_robot("aloha_sim")
    np.testing.assert_allclose(aloha.actions_to_robot(actions, np.zeros(14))[0, [6, 13]], command, atol=1e-7)


def test_aloha_joints_two_and_three_of_each_arm_are_flipped() -> None:
    state = np.arange(1.0, 15.0)
    signs = [1, -1, -1, 1, 1, 1, None, 1, -1, -1, 1, 1, 1, None]
    changed = get_robot("aloha").state_to_model(state)
    assert [None if sign is None else changed[i] / state[i] for i, sign in enumerate(signs)] == signs
    np.testing.assert_array_equal(get_robot("aloha_standard").state_to_model(state), state)


def test_aloha_relative_actions_are_relative_to_the_flipped_state() -> None:
    aloha, state = get_robot("aloha"), np.zeros(14)
    state[1] = 0.25
    model_state = aloha.state_to_model(state)
    # The network says "0.5 from where you are" in its own direction: -0.25 + 0.5 there is -0.25 here.
    actions = np.zeros((1, 14))
    actions[0, 1] = 0.5
    assert aloha.actions_to_robot(actions, model_state)[0, 1] == -0.25


# --- declarations --------------------------------------------------------------------------------------------------


def test_built_in_robots_are_what_the_checkpoints_expect() -> None:
    facts: dict[str, Any] = {
        # state, actions, delta mask, cameras with a slot
        "aloha": (14, 14, [6, -1, 6, -1], 3),
        "aloha_standard": (14, 14, [6, -1, 6, -1], 3),
        "aloha_sim": (14, 14, [], 3),
        "droid": (8, 8, [], 2),
        "droid_joint_position": (8, 8, [7, -1], 2),
        "libero": (8, 7, [], 2),
        "libero_delta": (8, 7, [6, -1], 2),
    }
    assert set(robot_names()) == {*facts, "metaworld"}  # that one: tests/demo/test_scene.py
    for name, (state, actions, delta, cameras) in facts.items():
        robot = get_robot(name)
        assert (robot.name, robot.state_dim, robot.action_dim) == (name, state, actions)
        assert robot.delta_mask == bool_mask(delta)
        assert robot.slots == CAMERA_SLOTS
        assert sum(camera.slot is not None for camera in robot.cameras) == cameras


def test_openpi_names_lead_to_robots_with_their_horizons() -> None:
    horizons = {
        "pi0_aloha": 50, "pi05_aloha": 50, "pi0_aloha_sim": 50, "pi0_droid": 10, "pi05_droid": 15, "pi0_libero": 50,
        "pi05_libero": 10,
    }  # fmt: skip
    assert set(horizons) == set(OPENPI_NAMES)
    for name, horizon in horizons.items():
        config = get_robot(name).configure(Pi0Config(name.split("_")[0]))  # type: ignore[arg-type]
        assert config.action_horizon == horizon
        assert config.discrete_state_input == (name.startswith("pi05") and name != "pi05_libero")
    unknown = Robot("r", (Camera("c", "s"),), (StatePart("q", 1),), 1, ("s",))
    assert unknown.configure(Pi0Config("pi05")) == Pi0Config("pi05")


def test_bool_mask() -> None:
    assert bool_mask([2, -2, 1]) == (True, True, False, False, True)
    assert bool_mask([]) == ()


@pytest.mark.parametrize("name", [*robot_names(), "example"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_actions_go_to_model_units_and_back(name: str, seed: int) -> None:
    robot = example_robot() if name == "example" else get_robot(name)
    rng = np.random.default_rng(seed)
    state = robot.state_to_model(rng.uniform(-1, 1, (2, robot.state_dim)))
    actions = rng.uniform(-3, 3, (2, 5, robot.action_dim))
    there = robot.actions_to_model(actions, state)
    np.testing.assert_allclose(robot.actions_to_robot(there, state), actions, atol=1e-12)
    relative = np.flatnonzero(robot.delta_mask)
    # Where nothing is mapped, the model sees the plain difference.
    mapped = {dim for mapping in robot.action_maps for dim in mapping.dims}
    plain = [dim for dim in relative if dim not in mapped]
    np.testing.assert_allclose(there[..., plain], actions[..., plain] - state[:, None, plain], atol=1e-12)


def test_a_range_map_is_linear_between_and_beyond() -> None:
    mapping = RangeMap((0,), robot=(0.0, 85.0), model=(1.0, 0.0))
    np.testing.assert_allclose(mapping.to_model(np.array([0.0, 42.5, 85.0, 170.0])), [1.0, 0.5, 0.0, -1.0], atol=1e-12)


# --- files ---------------------------------------------------------------------------------------------------------


def example_text() -> str:
    match = re.search(r"<!-- example: my_robot -->\n```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert match is not None
    return match[1]


def example_robot() -> Robot:
    path = DATA / "my_robot.yaml"
    return get_robot(path)


def test_the_example_of_the_documentation_loads() -> None:
    path = DATA / "my_robot.yaml"
    assert path.read_text() == example_text(), "tests/data/my_robot.yaml and docs/robots.md differ"
    robot = get_robot(path)
    assert robot == Robot(
        name="my_robot",
        cameras=(
            Camera("front", "base_0_rgb"),
            Camera("images/wrist", "left_wrist_0_rgb", required=False, layout="chw"),
            Camera("images/overview", None, required=False),
        ),
        state=(StatePart("joints", 6), StatePart("gripper_mm", 1)),
        action_dim=7,
        slots=CAMERA_SLOTS,
        state_maps=(RangeMap((2,), (-1, 1), (1, -1)), RangeMap((6,), (0, 85), (0, 1))),
        action_maps=(RangeMap((2,), (-1, 1), (1, -1)), RangeMap((6,), (0, 85), (0, 1))),
        delta_mask=(True,) * 6 + (False,),
        prompt="put the block into the box",
        action_horizon={"pi0": 50, "pi05": 50},
    )


def minimal() -> dict[str, Any]:
    return {"cameras": {"cam": {"slot": "base"}}, "state": {"keys": {"q": 2}}, "actions": {"dim": 2}}


def write(folder: Path, data: Any, name: str = "robot.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(data) if name.endswith("json") else yaml.safe_dump(data, sort_keys=False))
    return path


def test_json_is_as_good_as_yaml_and_defaults_are_few(tmp_path: Path) -> None:
    robot = get_robot(write(tmp_path, minimal(), "robot.json"))
    assert robot == get_robot(write(tmp_path, minimal()))
    assert robot == Robot("robot", (Camera("cam", "base"),), (StatePart("q", 2),), 2, ("base",))
    assert get_robot(robot) is robot


def test_a_file_extends_a_built_in_robot_or_another_file(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "droid", "prompt": "stack", "actions": {"delta": [7, -1]}}, "mine.yaml")
    robot = get_robot(write(tmp_path, {"extends": "mine.yaml", "actions": {"dim": 9}}, "second.yaml"))
    droid = get_robot("droid")
    assert (robot.name, robot.prompt, robot.action_dim) == ("second", "stack", 9)
    assert robot.cameras == droid.cameras and robot.delta_mask == bool_mask([7, -1])
    with pytest.raises(ValueError, match=r"loop\.yaml extends itself"):
        get_robot(write(tmp_path, {"extends": "loop.yaml"}, "loop.yaml"))


def test_guards_are_off_unless_declared() -> None:
    for name in robot_names():
        assert get_robot(name).guards is None
        assert get_robot(name).control_hz == (80 if name == "metaworld" else None)


def test_the_guards_of_the_documentation_load(tmp_path: Path) -> None:
    match = re.search(r"<!-- example: guarded -->\n```yaml\n(.*?)```", SAFETY.read_text(), re.DOTALL)
    assert match is not None
    (tmp_path / "guarded.yaml").write_text(match[1])
    robot = get_robot(tmp_path / "guarded.yaml")
    arm = ((-3.0, 3.0), (-1.8, 1.8), (-1.6, 1.6), (-3.0, 3.0), (-1.8, 1.8), (-3.0, 3.0), None)
    jump = (0.2,) * 6 + (1.0,)
    assert robot.guards == Guards("clip", arm * 2, (3.0,) * 14, jump * 2, 200) and robot.control_hz == 50
    assert robot.action_maps == get_robot("aloha").action_maps


def test_one_number_or_pair_stands_for_every_dimension(tmp_path: Path) -> None:
    data = {**minimal(), "control_hz": 10, "guards": {"limits": [-1, 1.5], "max_velocity": 2, "max_jump": [None, 1]}}
    guards = get_robot(write(tmp_path, data)).guards
    assert guards == Guards("refuse", ((-1, 1.5),) * 2, (2, 2), (None, 1))
    assert get_robot(write(tmp_path, {**data, "guards": {**guards.to_dict()}})).guards == guards


def test_guards_are_merged_key_by_key_and_taken_away_by_null(tmp_path: Path) -> None:
    write(tmp_path, {**minimal(), "guards": {"limits": [-1, 1], "max_jump": 1}}, "base.yaml")
    robot = get_robot(write(tmp_path, {"extends": "base.yaml", "guards": {"on_violation": "hold", "max_jump": 2}}))
    assert robot.guards == Guards("hold", ((-1, 1),) * 2, max_jump=(2, 2))
    assert get_robot(write(tmp_path, {"extends": "base.yaml", "guards": None})).guards is None


def change(path: str, value: Any) -> Any:
    def apply(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("camera", {}, r"unknown keys \['camera'\], expected some of .*'cameras'"),
        ("cameras", ..., "cameras is missing"),
        ("cameras", [], r"cameras is \[\], expected keys with values"),
        ("cameras", {}, "no camera that feeds a slot"),
        ("cameras.cam", {}, r"cameras\.cam\.slot is missing"),
        ("cameras.cam.required", 1, r"cameras\.cam\.required is 1, expected true or false"),
        ("cameras.cam.layout", "HWC", "layout of 'cam' is 'HWC', expected"),
        ("cameras.cam.size", 3, r"unknown keys \['size'\] in cameras\.cam"),
        ("cameras.second", {"slot": "base"}, r"slots are fed twice: \['base', 'base'\]"),
        ("slots", ["wrist"], r"camera 'cam' feeds 'base', expected one of \('wrist',\)"),
        ("slots", ["base", "a", "b", "c", "d"], "5 slots, expected 1 to 4"),
        ("slots", ["base", 1], r"slots\[1\] is 1, expected text"),
        ("slots", ["base", "base"], "slots are listed twice"),
        ("state.keys.q", "2", r"state\.keys\.q is '2', expected a whole number"),
        ("state.keys.q", True, r"state\.keys\.q is True, expected a whole number"),
        ("state.keys.q", 0, "size of at least 1"),
        ("state.keys.cam", 1, r"keys are used twice: \['cam', 'cam'\]"),
        ("state.keys", {}, "expected parts with a size"),
        ("state.map", [], r"unknown keys \['map'\] in state"),
        ("state.maps", [{"dims": [2], "robot": [0, 1], "model": [0, 1]}], r"dimensions \[2\], expected 0\.\.1"),
        ("state.maps", [{"dims": [0], "robot": [1, 1], "model": [0, 1]}], r"robot is \(1, 1\), expected two different"),
        ("state.maps", [{"dims": [0], "robot": [1], "model": [0, 1]}], r"robot is \(1,\), expected two different"),
        ("state.maps", [{"dims": [0], "robot": [0, 1]}], r"state\.maps\[0\]\.model is missing"),
        ("state.maps", [{"dims": [0], "kind": "cubic"}], r"state\.maps\[0\]\.kind is 'cubic', expected 'range' or"),
        ("state.maps", [{"dims": [0, 0], "kind": "aloha_gripper"}], "a dimension twice"),
        ("state.maps", [{"dims": [0], "kind": "aloha_gripper", "robot": [0, 1]}], r"unknown keys \['robot'\]"),
        ("actions.maps", [{"dims": [0], "kind": "aloha_gripper"}], "maps the state only"),
        ("actions.dim", ..., r"actions\.dim is missing"),
        ("actions.dim", 0, "action_dim is 0"),
        ("actions.delta", [3], "delta mask covers 3 dimensions of 2"),
        ("actions.delta", [-1, 0.5], r"actions\.delta\[1\] is 0\.5, expected a whole number"),
        ("actions", {"dim": 3, "delta": [3]}, "beyond the 2 of the state"),
        ("action_horizon", 0, "action_horizon has 'pi0': 0"),
        ("action_horizon", {"pi1": 5}, r"unknown keys \['pi1'\] in action_horizon"),
        ("prompt", 5, "prompt is 5, expected text or null"),
        ("discrete_state_input", "no", "discrete_state_input is 'no', expected true or false"),
        ("control_hz", 0, "control_hz is 0, expected actions per second, above 0"),
        ("control_hz", "50", "control_hz is '50', expected a whole number or a number or null"),
        ("guards", [], r"guards is \[\], expected keys with values or null"),
        ("guards", {}, "guards without any limit"),
        ("guards", {"limit": [0, 1]}, r"unknown keys \['limit'\] in guards"),
        ("guards", {"limits": [0, 1], "jump": 1}, r"unknown keys \['jump'\] in guards"),
        ("guards", {"limits": [0, 1, 2]}, r"limits\[0\] is \(0, 1, 2\), expected two finite numbers"),
        ("guards", {"limits": [[0, 1]]}, "limits has 1 entries, expected 2"),
        (
            "guards",
            {"limits": [[0, "1"], None]},
            r"guards\.limits\[0\]\[1\] is '1', expected a whole number or a number",
        ),
        ("guards", {"limits": [[1, 0], None]}, r"limits\[0\] is \(1, 0\), expected two finite numbers"),
        ("guards", {"limits": [7, None]}, r"guards\.limits\[0\] is 7, expected a list or null"),
        (
            "guards",
            {"max_jump": [0.1, "x"]},
            r"guards\.max_jump\[1\] is 'x', expected a whole number or a number or null",
        ),
        ("guards", {"max_jump": True}, r"guards\.max_jump is True, expected .*a number or a list"),
        ("guards", {"max_jump": -0.1}, r"max_jump\[0\] is -0\.1, expected a finite number above 0"),
        ("guards", {"max_velocity": 1}, "max_velocity is per second: it needs control_hz"),
        ("guards", {"on_violation": "hold", "limits": [0, 1]}, r"dimensions \[0, 1\] have no max_jump"),
        ("guards", {"on_violation": "stop", "limits": [0, 1]}, "on_violation is 'stop', expected one of"),
        ("guards", {"max_observation_age_ms": "1 s"}, r"guards\.max_observation_age_ms is '1 s', expected .*a number"),
        ("extends", "drod", "robot 'drod' is none of .*did you mean 'droid'"),
    ],
)
def test_a_wrong_declaration_names_the_key_and_the_file(tmp_path: Path, path: str, value: Any, message: str) -> None:
    data = minimal()
    change(path, value)(data)
    file = write(tmp_path, data)
    with pytest.raises(ValueError, match=message) as error:
        get_robot(file)
    assert path == "extends" or str(file) in str(error.value)


def test_unreadable_files_and_unknown_names(tmp_path: Path) -> None:
    file = tmp_path / "robot.yaml"
    for text, message in (
        ("cameras: [", "cannot read"),
        ("- a\n", "holds list"),
        ("prompt: a\nprompt: b\n", r"repeated keys \['prompt'\]"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            get_robot(file)
    with pytest.raises(ValueError, match="does not exist"):
        get_robot(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=r"robot 'alhoa' is none of .* did you mean 'aloha'"):
        get_robot("alhoa")

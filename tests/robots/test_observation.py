from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pi0_engine.robots.files import get_robot
from pi0_engine.robots.observation import read_observation

FRAME = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
CHW = FRAME.transpose(2, 0, 1)


def aloha() -> dict[str, Any]:
    images = {f"cam_{name}": CHW for name in ("high", "low", "left_wrist", "right_wrist")}
    return {"state": np.linspace(0, 1, 14), "images": images, "prompt": "fold it"}


def droid() -> dict[str, Any]:
    return {
        "observation/exterior_image_1_left": FRAME,
        "observation/wrist_image_left": FRAME,
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.25]),
        "prompt": "do something",
    }


# --- what is read --------------------------------------------------------------------------------------------------


def test_frames_go_to_their_slots_as_height_width_colour() -> None:
    read = read_observation(aloha(), get_robot("aloha"))
    assert set(read.frames) == {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"}
    for frame in read.frames.values():
        np.testing.assert_array_equal(frame, FRAME)
    np.testing.assert_array_equal(read.state, np.linspace(0, 1, 14))
    assert read.prompt == "fold it"


def test_optional_and_ignored_cameras_may_be_absent() -> None:
    observation = {**aloha(), "images": {"cam_high": CHW}}
    assert set(read_observation(observation, get_robot("aloha")).frames) == {"base_0_rgb"}


def test_nested_and_flat_keys_are_the_same() -> None:
    robot = get_robot("droid")
    nested: dict[str, Any] = {"prompt": "do something", "observation": {}}
    for key, value in droid().items():
        if key != "prompt":
            nested["observation"][key.removeprefix("observation/")] = value
    left, right = read_observation(nested, robot), read_observation(droid(), robot)
    np.testing.assert_array_equal(left.state, right.state)
    assert set(left.frames) == set(right.frames)


@pytest.mark.parametrize("gripper", [0.25, np.float32(0.25), np.array(0.25), [0.25], np.array([0.25], np.float16)])
def test_a_part_of_one_number_may_be_a_scalar(gripper: Any) -> None:
    read = read_observation({**droid(), "observation/gripper_position": gripper}, get_robot("droid"))
    assert read.state.tolist() == [*np.linspace(-1, 1, 7), 0.25]


def test_float_images_are_scaled_and_truncated() -> None:
    frame = np.zeros((8, 10, 3), np.float32)
    frame[0, 0] = [1.0, 0.5, 0.999]  # 255, int(127.5), int(254.7)
    observation = {
        **droid(),
        "observation/exterior_image_1_left": frame,
        "observation/wrist_image_left": frame.transpose(2, 0, 1),  # the layout "any" of DROID
    }
    frames = read_observation(observation, get_robot("droid")).frames
    for slot in ("base_0_rgb", "left_wrist_0_rgb"):
        assert frames[slot].dtype == np.uint8 and frames[slot].shape == (8, 10, 3)
        assert frames[slot][0, 0].tolist() == [255, 127, 254] and not frames[slot][1:].any()


def test_the_instruction_is_the_calls_then_the_observations_then_the_robots() -> None:
    robot = get_robot("aloha_sim")
    for given in ("nod", b"nod", np.asarray("nod"), np.asarray(b"nod"), np.str_("nod"), np.bytes_(b"nod")):
        observation = {**aloha(), "prompt": given}
        assert read_observation(observation, robot).prompt == "nod"
        assert read_observation(observation, robot, "wave").prompt == "wave"
        assert read_observation(aloha(), robot, given).prompt == "nod"  # type: ignore[arg-type]
    silent = aloha()
    del silent["prompt"]
    assert read_observation(silent, robot).prompt == "Transfer cube"


def test_an_observation_is_not_modified() -> None:
    observation = aloha()
    observation["state"].setflags(write=False)
    images = dict(observation["images"])
    read = read_observation(observation, get_robot("aloha"))
    read.state[0] = 5.0
    assert observation["images"] == images and observation["state"][0] == 0.0


def test_undeclared_keys_without_an_image_are_ignored() -> None:
    read_observation({**droid(), "timestamp": 1.5, "past": np.zeros((3, 4)), "note": "x"}, get_robot("droid"))


# --- errors --------------------------------------------------------------------------------------------------------


def _without(key: str) -> Any:
    return lambda observation: observation.pop(key)


def _with(**values: Any) -> Any:
    return lambda observation: observation.update({key.replace("__", "/"): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("robot", "change", "message"),
    [
        ("droid", _without("observation/wrist_image_left"), "'observation/wrist_image_left' is missing; robot 'droid'"),
        ("droid", _without("observation/joint_position"), "key 'observation/joint_position' is missing"),
        ("droid", _without("prompt"), "key 'prompt' is missing.*no default instruction"),
        ("droid", _with(observation__wrist_image=FRAME), "'observation/wrist_image' holds an image, but robot 'droid'"),
        ("aloha", _with(images={"cam_high": CHW, "cam_left": CHW}), "'images/cam_left' holds"),
        ("aloha", _with(images={}), "key 'images/cam_high' is missing"),
        ("aloha", _with(images={"cam_high": FRAME}), r"shape \[8, 10, 3\], expected \[3, H, W\] \(layout 'chw' is"),
        ("droid", _with(observation__wrist_image_left=np.zeros((8, 8, 4), np.uint8)), r"shape \[8, 8, 4\], expected"),
        ("droid", _with(observation__wrist_image_left=np.zeros((3, 8, 3), np.uint8)), "ambiguous, declare hwc or chw"),
        ("droid", _with(observation__wrist_image_left=FRAME[None]), r"shape \[1, 8, 10, 3\], expected \[H, W, 3\] or"),
        ("droid", _with(observation__wrist_image_left=FRAME.astype(np.int64)), r"is int64 \[8, 10, 3\], expected an"),
        ("droid", _with(observation__wrist_image_left="frame.png"), "expected an image, uint8 or float"),
        ("droid", _with(observation__wrist_image_left=0 * FRAME + 255.0), r"from 255\.0 to 255\.0, expected 0 to 1"),
        ("droid", _with(observation__wrist_image_left=FRAME + np.nan), "from nan to nan, expected 0 to 1"),
        ("droid", _with(observation__joint_position=np.zeros(6)), r"joint_position' has shape \[6\], expected \[7\]"),
        ("droid", _with(observation__joint_position=np.zeros((1, 7))), r"shape \[1, 7\], expected \[7\]"),
        ("droid", _with(observation__joint_position=0.5), r"joint_position' has shape \[\], expected \[7\]"),
        ("droid", _with(observation__gripper_position=[0.5, 0.5]), r"shape \[2\], expected \[1\]"),
        ("droid", _with(observation__joint_position=[0, 1, 2, np.nan, 4, 5, 6]), "nan at index 3, expected finite"),
        ("droid", _with(observation__gripper_position=np.inf), "gripper_position' is inf at index 0"),
        ("droid", _with(observation__joint_position=["a"] * 7), "expected 7 real numbers"),
        ("droid", _with(observation__joint_position=np.ones(7, bool)), "is bool, expected 7 real numbers"),
        ("droid", _with(prompt=5), "key 'prompt' is int, expected text"),
        ("droid", _with(prompt=b"\xff"), "not UTF-8"),
    ],
)
def test_a_bad_observation_names_key_given_and_expected(robot: str, change: Any, message: str) -> None:
    observation = aloha() if robot == "aloha" else droid()
    read_observation(observation, get_robot(robot))
    change(observation)
    with pytest.raises(ValueError, match=message):
        read_observation(observation, get_robot(robot))


def test_something_else_than_named_values_is_refused() -> None:
    with pytest.raises(ValueError, match="the observation is list, expected a dict"):
        read_observation([1, 2], get_robot("droid"))  # type: ignore[arg-type]

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_engine.config import GemmaConfig, Pi0Config, SiglipConfig
from pi0_engine.robots.declaration import Camera, Robot, StatePart
from pi0_engine.robots.files import get_robot, robot_names
from pi0_engine.robots.normalization import Normalizer, NormStats
from pi0_engine.robots.transforms import ObservationTransform
from pi0_engine.text.files import demo_tokenizer
from pi0_engine.text.tokenizer import load_tokenizer

SIZE = 28


def config(model_type: Any = "pi0", **changes: Any) -> Pi0Config:
    llm = GemmaConfig(16, 1, 16, num_heads=1, num_kv_heads=1, head_dim=16, vocab_size=2048)
    expert = dataclasses.replace(llm, vocab_size=None)
    return Pi0Config(model_type, SiglipConfig(16, 1, 1, 16, image_size=SIZE), llm, expert, **changes)


def random_stats(robot: Robot, seed: int, mode: str = "zscore", flavour: Any = "openpi") -> NormStats:
    rng = np.random.default_rng(seed)
    parts = []
    for dims in (robot.state_dim, robot.action_dim):
        low, spread = rng.uniform(-1, 1, dims), rng.uniform(0.2, 2, dims)
        if mode == "zscore":
            parts.append(Normalizer.zscore(low, spread, flavour))
        else:
            parts.append(Normalizer.quantile(low, low + spread, flavour))
    return NormStats(parts[0], parts[1], "random")


def transform(
    robot: Robot | str, cfg: Pi0Config | None = None, stats: NormStats | None = None, **options: Any
) -> ObservationTransform:
    cfg = cfg or config()
    tokenizer = load_tokenizer(demo_tokenizer(), cfg)
    return ObservationTransform(get_robot(robot), stats or NormStats.identity(), tokenizer, cfg, **options)


def observe(robot: Robot, seed: int, absent: frozenset[str] = frozenset(), prompt: Any = "fold it") -> dict[str, Any]:
    """A random observation that follows a declaration, frames of the network's size."""
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        place, *parts = out, *key.split("/")
        if parts[0] == "images":  # ALOHA's are nested
            place = out.setdefault("images", {})
            parts = parts[1:]
        place["/".join(parts)] = value

    for camera in robot.cameras:
        if camera.key not in absent:
            frame = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            put(camera.key, frame.transpose(2, 0, 1) if camera.layout == "chw" else frame)
    for part in robot.state:
        out[part.key] = rng.uniform(0, 1, part.size)
    if prompt is not None:
        out[robot.prompt_key] = prompt
    return out


# --- in -----------------------------------------------------------------------------------------------------------


def test_aloha_observation_by_hand() -> None:
    robot = get_robot("aloha")
    stats = NormStats(Normalizer.zscore([0.5] * 14, [0.25] * 14), Normalizer.zscore([0.0] * 14, [1.0] * 14), "by hand")
    side = transform(robot, stats=stats)
    observation = observe(robot, 0)
    observation["state"] = np.full(14, 1.0, np.float32)
    inputs, context = side.prepare(observation)
    inputs.validate(side.config)

    # Flip (-1 at joints 1 and 2 of each arm), gripper stretched to a right angle, then (x - 0.5) / (0.25 + 1e-6).
    flipped = np.array([1, -1, -1, 1, 1, 1, 0, 1, -1, -1, 1, 1, 1, 0], float)
    flipped[[6, 13]] = (np.pi / 2 - 0.5476) / (1.6296 - 0.5476)
    expected = np.zeros(32)
    expected[:14] = (flipped - 0.5) / 0.250001
    np.testing.assert_allclose(inputs.state[0], expected, rtol=1e-6)
    np.testing.assert_allclose(context.state[0], flipped, rtol=1e-6)
    np.testing.assert_array_equal(context.robot_state, np.ones((1, 14)))
    assert context.prompts == ("fold it",)

    assert inputs.image_masks.tolist() == [[True, True, True]]
    for slot, name in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist")):
        np.testing.assert_array_equal(inputs.frames[0][slot], observation["images"][name].transpose(1, 2, 0))

    ids, mask = side.tokenizer.encode_prompt("fold it")
    np.testing.assert_array_equal(inputs.tokens[0], ids)
    np.testing.assert_array_equal(inputs.token_mask[0], mask)


def test_droid_takes_a_scalar_gripper_and_masks_the_third_slot() -> None:
    robot = get_robot("droid")
    observation = observe(robot, 1)
    observation["observation/gripper_position"] = 0.75
    inputs, context = transform(robot).prepare(observation)
    assert context.robot_state[0, 7] == 0.75
    assert inputs.image_masks.tolist() == [[True, True, False]]
    assert len(inputs.frames[0]) == 2
    np.testing.assert_allclose(inputs.state[0, :8], context.robot_state[0], rtol=1e-6)
    assert not inputs.state[0, 8:].any()


def test_pi05_prompt_holds_the_normalised_state_of_real_dimensions_only() -> None:
    robot = get_robot("droid")
    cfg = config("pi05")
    stats = NormStats(Normalizer.quantile([0.0] * 8, [1.0] * 8), Normalizer.identity(), "by hand")
    observation = observe(robot, 2, prompt=b"pick_up")
    # Normalised: 0 -> -1 -> bin 0; 0.5 -> just below 0 (the 1e-6) -> bin 127; 1 -> just below 1 -> bin 255.
    observation["observation/joint_position"] = np.array([0, 0.5, 1, 0.25, 0.75, -0.1, 1.1])
    observation["observation/gripper_position"] = np.array([0.5])
    bins = "0 127 255 63 191 -1 255 127"
    plain = transform(robot, cfg, stats)
    expected = [2, *plain.tokenizer._encoder.encode(f"Task: pick up, State: {bins};\nAction: ")]
    inputs, _ = plain.prepare(observation)
    assert inputs.tokens[inputs.token_mask].tolist() == expected
    # What lerobot 0.4 trained with: 24 zeros, each in bin 128, behind them.
    padded = transform(robot, cfg, stats, pad_prompt_state=True)
    expected = [2, *padded.tokenizer._encoder.encode(f"Task: pick up, State: {bins}{' 128' * 24};\nAction: ")]
    inputs, _ = padded.prepare(observation)
    assert inputs.tokens[inputs.token_mask].tolist() == expected


@settings(deadline=None, max_examples=20)
@given(data=st.data(), model_type=st.sampled_from(["pi0", "pi05"]))
def test_a_batch_is_its_observations(data: Any, model_type: str) -> None:
    robot = get_robot("aloha")
    side = transform(robot, config(model_type), random_stats(robot, 0))
    optional = ["images/cam_left_wrist", "images/cam_right_wrist", "images/cam_low"]
    observations = [
        observe(
            robot,
            seed=data.draw(st.integers(0, 99)),
            absent=frozenset(data.draw(st.sets(st.sampled_from(optional)))),
            prompt=data.draw(st.text("abc _\n", max_size=20)),
        )
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    inputs, context = side.prepare(observations)
    inputs.validate(side.config)
    assert inputs.batch == len(observations) == len(context.prompts)
    for index, observation in enumerate(observations):
        alone, _ = side.prepare(observation)
        assert len(inputs.frames[index]) == len(alone.frames[0])
        assert all(map(np.array_equal, inputs.frames[index], alone.frames[0]))
        for field in dataclasses.fields(inputs):
            if field.name not in ("images", "frames"):
                np.testing.assert_array_equal(getattr(inputs, field.name)[index], getattr(alone, field.name)[0])
        present = [f"cam_{name}" in observation["images"] for name in ("high", "left_wrist", "right_wrist")]
        assert inputs.image_masks[index].tolist() == present


def test_a_bad_observation_in_a_batch_is_counted() -> None:
    side = transform("droid")
    good = observe(side.robot, 0)
    bad = {**good, "observation/gripper_position": np.nan}
    with pytest.raises(ValueError, match=r"^observation 1: observation key 'observation/gripper_position' is nan"):
        side.prepare([good, bad])
    with pytest.raises(ValueError, match=r"^observation key 'observation/gripper_position' is nan"):
        side.prepare(bad)
    with pytest.raises(ValueError, match="batch of observations is empty"):
        side.prepare([])


# --- out ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", robot_names())
@pytest.mark.parametrize(("mode", "flavour"), [("zscore", "openpi"), ("quantile", "openpi"), ("zscore", "lerobot")])
def test_every_robots_actions_go_to_the_network_and_back(name: str, mode: str, flavour: str) -> None:
    robot = get_robot(name)
    side = transform(robot, stats=random_stats(robot, 7, mode, flavour))
    _, context = side.prepare([observe(robot, 1), observe(robot, 2)])
    actions = np.random.default_rng(3).uniform(-1, 1, (2, 3, 5, robot.action_dim))
    encoded = side.encode_actions(actions, context)
    assert encoded.shape == (2, 3, 5, 32) and encoded.dtype == np.float32
    assert not encoded[..., robot.action_dim :].any()
    back = side.finish(encoded, context)
    assert back.shape == actions.shape and back.dtype == np.float32
    np.testing.assert_allclose(back, actions, atol=1e-5)


def test_aloha_actions_by_hand() -> None:
    robot = get_robot("aloha")
    stats = NormStats(Normalizer.identity(), Normalizer.zscore([0.1] * 14, [0.5] * 14), "by hand")
    side = transform(robot, stats=stats)
    observation = observe(robot, 0)
    observation["state"] = np.full(14, 0.25)
    _, context = side.prepare(observation)
    network = np.zeros((1, 2, 32), np.float32)
    network[0, 1] = 1.0
    actions = side.finish(network, context)[0]
    # Un-normalised: 0.1 and 1 * 0.500001 + 0.1. Joint 0: + 0.25. Joint 1: + (-0.25), then the other way round.
    for step, value in enumerate((0.1, 0.600001)):
        np.testing.assert_allclose(actions[step, [0, 3, 7, 12]], value + 0.25, atol=1e-6)
        np.testing.assert_allclose(actions[step, [1, 2, 8, 9]], -(value - 0.25), atol=1e-6)
        np.testing.assert_allclose(actions[step, [6, 13]], (value + 0.5476 + 0.6213) / 2.1123, atol=1e-6)


def test_finish_uses_each_observations_own_state() -> None:
    robot = get_robot("libero_delta")
    side = transform(robot)
    observations = [observe(robot, 1), observe(robot, 2)]
    _, context = side.prepare(observations)
    actions = side.finish(np.zeros((2, 4, 32)), context)
    for index, observation in enumerate(observations):
        expected = [*observation["observation/state"][:6], 0.0]
        np.testing.assert_allclose(actions[index], np.tile(expected, (4, 1)), rtol=1e-6)


def test_finish_refuses_wrong_shapes_and_nan() -> None:
    side = transform("droid")
    _, context = side.prepare(observe(side.robot, 0))
    for shape in ((2, 4, 32), (1, 4, 8), (1, 32)):
        with pytest.raises(ValueError, match=rf"\[{shape[0]}.*expected \[1, \.\.\., H, 32\]"):
            side.finish(np.zeros(shape), context)
    with pytest.raises(ValueError, match=r"expected \[1, \.\.\., H, 8\]"):
        side.encode_actions(np.zeros((1, 4, 32)), context)
    actions = np.zeros((1, 4, 32))
    actions[0, 3, 31] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        side.finish(actions, context)


# --- parts that do not fit --------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    droid = get_robot("droid")
    with pytest.raises(ValueError, match=r"state with 8 dimensions, but random covers 7: it is of another robot"):
        short = Normalizer.zscore([0.0] * 7, [1.0] * 7)
        transform(droid, stats=dataclasses.replace(random_stats(droid, 0), state=short))
    with pytest.raises(ValueError, match="state with 8 dimensions, but the model takes at most 6"):
        transform(droid, config(action_dim=6))
    cfg = config()
    tokenizer = load_tokenizer(demo_tokenizer(), config("pi05"))
    with pytest.raises(ValueError, match="tokenizer was made for another config"):
        ObservationTransform(droid, NormStats.identity(), tokenizer, cfg)
    assert not caplog.records
    aloha_stats = random_stats(get_robot("aloha"), 0)
    with caplog.at_level(logging.WARNING):
        transform(droid, stats=aloha_stats)
    assert "covers 14: is it this robot's?" in caplog.text


def test_a_delta_mask_other_than_the_checkpoints_is_refused() -> None:
    joints = (True,) * 7 + (False,)
    trained = dataclasses.replace(NormStats.identity(), delta_mask=joints, source="lerobot")
    transform("droid_joint_position", stats=trained)
    with pytest.raises(ValueError, match=r"robot 'droid' takes actions \[\] as relative .* lerobot says \[0, 1, 2"):
        transform("droid", stats=trained)
    absolute = dataclasses.replace(trained, delta_mask=(False,) * 8)
    transform("droid", stats=absolute)
    with pytest.raises(ValueError, match=r"takes actions \[0, 1, 2, 3, 4, 5, 6\] .* says \[\]"):
        transform("droid_joint_position", stats=absolute)


def test_four_views() -> None:
    slots = ("a", "b", "c", "d")
    robot = Robot("four", tuple(Camera(f"cam_{slot}", slot) for slot in slots), (StatePart("q", 2),), 2, slots)
    side = transform(robot)
    observation = observe(robot, 5)
    inputs, _ = side.prepare(observation)
    inputs.validate(side.config)
    for index, slot in enumerate(slots):
        np.testing.assert_array_equal(inputs.frames[0][index], observation[f"cam_{slot}"])


def test_a_state_that_overflows_when_it_is_normalised() -> None:
    robot = get_robot("libero")
    given = observe(robot, seed=0)
    given["observation/state"] = np.zeros(8)
    given["observation/state"][3] = 1e300
    with pytest.raises(ValueError, match=r"the state holds 1e\+300 at index 3"):
        transform(robot).prepare(given)


@pytest.mark.parametrize("name", ["state", "actions"])
def test_statistics_of_another_robot_are_refused(name: str) -> None:
    """Either half that covers fewer dimensions than the robot has: the rest would pass in the wrong units."""
    robot = get_robot("libero")
    whole = random_stats(robot, 0)
    dims = {"state": robot.state_dim, "actions": robot.action_dim}[name] - 1
    fewer = Normalizer.zscore(np.zeros(dims), np.ones(dims))
    with pytest.raises(ValueError, match=rf"{name} with {dims + 1} dimensions, but random covers {dims}: it is of an"):
        transform(robot, stats=dataclasses.replace(whole, **{name: fewer}))

"""Continuing a chunk through Pi0Policy: robot units in, a new chunk that agrees with the old one out."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import EngineConfig, ModelType, Pi0Config
from pi0_engine.engine.runtime import Engine
from pi0_engine.policy import Pi0Policy
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.normalization import Normalizer, NormStats
from pi0_engine.robots.transforms import ObservationTransform
from pi0_engine.rtc.guidance import FixedPrefix, Guide
from pi0_engine.rtc.schedule import Leftover, RtcConfig, prefix_weights
from pi0_engine.text.files import demo_tokenizer
from pi0_engine.text.tokenizer import load_tokenizer
from tests.support.models import small_config
from tests.support.paths import ROOT

HORIZON, ACTIONS, STATE = 12, 7, 8


def config_of(model_type: ModelType) -> Pi0Config:
    small = small_config(model_type)
    llm = dataclasses.replace(small.llm, vocab_size=2048)
    return dataclasses.replace(small, llm=llm, action_dim=9, action_horizon=HORIZON, num_steps=10, max_token_len=120)


@functools.cache
def running(model_type: ModelType) -> Engine:
    return Engine(RandomCheckpoint(config_of(model_type)), EngineConfig(dtype="float32", backend="torch"))


def policy(model_type: ModelType = "pi0", robot: str = "libero", **rtc: Any) -> Pi0Policy:
    config = config_of(model_type)
    state = Normalizer.zscore([0.1] * STATE, [0.5] * STATE)
    actions = Normalizer.zscore(np.linspace(-0.2, 0.2, ACTIONS), np.linspace(0.3, 0.9, ACTIONS))
    transform = ObservationTransform(
        get_robot(robot),
        NormStats(state, actions, "a test"),
        load_tokenizer(demo_tokenizer(), config),
        config,
    )
    return Pi0Policy(running(model_type), transform, rtc=RtcConfig(**rtc))


def observation(seed: int = 0, moved: float = 0.0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    image, wrist = random.integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    state = random.uniform(-1, 1, STATE) + moved
    return {
        "observation/image": image,
        "observation/wrist_image": wrist,
        "observation/state": state,
        "prompt": "pick up the bowl",
    }


def random_actions(length: int, seed: int = 5) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 0.5, (length, ACTIONS))


@pytest.mark.parametrize("robot", ["libero", "libero_delta"])
@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
def test_leftover_reaches_the_engine_normalised(model_type: ModelType, robot: str) -> None:
    """By hand: (action - state where it is relative - mean) / std; zeros behind it; the pull ends where it ends."""
    side, given, seen = policy(model_type, robot, schedule="exp"), random_actions(6), observation()
    relative = np.zeros(ACTIONS)
    if robot == "libero_delta":
        relative[:6] = seen["observation/state"][:6]
    previous = np.zeros((1, HORIZON, 9), np.float32)
    normalised = (given - relative - np.linspace(-0.2, 0.2, ACTIONS)) / (np.linspace(0.3, 0.9, ACTIONS) + 1e-6)
    previous[0, :6, :ACTIONS] = normalised
    weights = prefix_weights("exp", 2, 6, HORIZON)[None]
    inputs, context = side.transform.prepare(seen)
    noise = np.random.default_rng(1).standard_normal((HORIZON, 9), dtype=np.float32)
    expected = side.engine.infer(inputs, noise[None, None], continuation=Guide(previous, weights, 10.0)).actions
    reply = side.infer(seen, noise=noise, leftover=Leftover(given, 2))
    np.testing.assert_allclose(reply["actions"], side.transform.finish(expected.numpy(), context)[0, 0], atol=1e-5)
    assert reply["rtc"] == {"used": True, "delay": 2, "leftover": 6}


def smooth_actions(length: int, seed: int) -> NDArray[np.float64]:
    """What a robot executes: no action is far from the one before it, as it would be of a network of random weights."""
    random, time = np.random.default_rng(seed), np.arange(length)[:, None] / 10
    return random.normal(0, 0.5, ACTIONS) + 0.5 * np.sin(time + random.uniform(0, 6, ACTIONS))


def jumps(model_type: ModelType, seed: int, leftover: bool) -> tuple[float, float]:
    """(largest difference to the old chunk while it is executed, largest step from its last action to a new one)."""
    delay, old = 3, smooth_actions(10, seed)
    given = Leftover(old, delay) if leftover else None
    new = policy(model_type).infer(observation(seed), seed=seed, leftover=given)["actions"]
    return float(np.abs(new[:delay] - old[:delay]).max()), float(np.abs(new[delay] - old[delay - 1]).max())


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
@pytest.mark.parametrize("seed", range(6))
def test_the_seam_between_chunks_is_smaller(model_type: ModelType, seed: int) -> None:
    seam, step = jumps(model_type, seed, leftover=True)
    seam_without, step_without = jumps(model_type, seed, leftover=False)
    print(f"while the old is executed {seam:.2f} of {seam_without:.2f}, into the new {step:.2f} of {step_without:.2f}")
    assert seam < 0.1 * seam_without and step < 0.3 * step_without


def test_relative_actions_are_anchored_anew() -> None:
    """The robot has moved since; in its units the certain actions stay where they were, to a part of the way."""
    side, before, after = policy(robot="libero_delta"), observation(0), observation(0, moved=0.8)
    old = side.infer(before, seed=0)["actions"][4:]
    anchored = side.infer(after, seed=1, leftover=Leftover(old, 4))["actions"]
    # As if the leftover still were relative to the state of the observation before.
    moved = old.copy()
    moved[:, :6] += 0.8
    stale = side.infer(after, seed=1, leftover=Leftover(moved, 4))["actions"]
    ours, theirs = (np.abs(new[:4, :6] - old[:4, :6]).max() for new in (anchored, stale))
    assert ours < 0.3 * theirs and ours < 0.4


@pytest.mark.parametrize("robot", ["libero", "libero_delta"])
def test_trained_mode_gives_the_actions_that_are_certain(robot: str) -> None:
    """They come back as they are, in the robot's units; the others follow from the network alone."""
    side, given = policy("pi05", robot, mode="trained"), random_actions(6)
    reply = side.infer(observation(), seed=0, num_samples=2, leftover=Leftover(given, 4))
    np.testing.assert_allclose(reply["actions"][:, :4], np.stack([given[:4]] * 2), atol=1e-6)
    assert reply["rtc"] == {"used": True, "delay": 4, "leftover": 6}
    assert np.abs(reply["actions"][:, 4:6] - given[4:]).max() > 0.1
    inputs, context = side.transform.prepare(observation())
    noise = np.random.default_rng(1).standard_normal((HORIZON, 9), dtype=np.float32)
    padded = np.concatenate([given, np.zeros((HORIZON - 6, ACTIONS))])
    previous = side.transform.encode_actions(padded[None], context)
    expected = side.engine.infer(inputs, noise[None, None], continuation=FixedPrefix(previous, (4,))).actions
    actions = side.infer(observation(), noise=noise, leftover=Leftover(given, 4))["actions"]
    np.testing.assert_allclose(actions, side.transform.finish(expected.numpy(), context)[0, 0], atol=1e-6)


def test_one_plan_serves_first_chunks_and_others_in_trained_mode() -> None:
    """Warm-up makes it; a first chunk has a prefix of no actions."""
    side = policy("pi05", mode="trained")
    fresh = Engine(RandomCheckpoint(config_of("pi05")), EngineConfig(dtype="float32", backend="torch"))
    side.engine = fresh
    first = side.infer(observation(), seed=0)
    assert first["rtc"] == {"used": False, "delay": 0, "leftover": 0}
    side.infer(observation(), seed=0, leftover=Leftover(random_actions(6), 2))
    no_delay = side.infer(observation(), seed=0, leftover=Leftover(random_actions(6), 0))
    assert no_delay["rtc"] == {"used": False, "delay": 0, "leftover": 6}
    np.testing.assert_array_equal(no_delay["actions"], first["actions"])
    assert [plan.per_token_time for plan in fresh._sessions] == [True]
    side.warm_up()
    assert all(plan.per_token_time for plan in fresh._sessions)


def test_pi0_is_refused_in_trained_mode() -> None:
    with pytest.raises(
        ValueError, match=r"rtc mode is 'trained', expected 'guided': π0 was trained with one flow time"
    ):
        policy("pi0", mode="trained")


def test_a_leftover_beyond_the_horizon_is_cut() -> None:
    """Element k stays the same control step, whatever the horizon of the new chunk."""
    side, given = policy(), random_actions(HORIZON)
    noise = np.random.default_rng(1).standard_normal((5, 9), dtype=np.float32)
    long = side.infer(observation(), noise=noise, leftover=Leftover(given, 2))
    short = side.infer(observation(), noise=noise, leftover=Leftover(given[:5], 2))
    np.testing.assert_array_equal(long["actions"], short["actions"])
    assert long["rtc"] == short["rtc"] == {"used": True, "delay": 2, "leftover": 5}
    all_executed = side.infer(observation(), noise=noise, leftover=Leftover(given[:3], 9))
    assert all_executed["rtc"] == {"used": True, "delay": 3, "leftover": 3}


def test_the_delay_is_certain_beyond_the_execution_horizon() -> None:
    """What will have been executed is pulled with all weight, even where the horizon was chosen too short."""
    side, wide = policy(execution_horizon=2), policy(execution_horizon=5, schedule="ones")
    given = Leftover(random_actions(8), 5)
    first, second = (p.infer(observation(), seed=0, leftover=given)["actions"] for p in (side, wide))
    np.testing.assert_array_equal(first, second)


def test_nothing_left_is_nothing_used() -> None:
    side = policy()
    plain = side.infer(observation(), seed=0)
    assert plain["rtc"] == {"used": False, "delay": 0, "leftover": 0}
    empty = side.infer(observation(), seed=0, leftover=Leftover(np.zeros((0, ACTIONS)), 3))
    assert empty["rtc"] == plain["rtc"]
    np.testing.assert_array_equal(empty["actions"], plain["actions"])
    no_pull = policy(schedule="zeros").infer(observation(), seed=0, leftover=Leftover(random_actions(4), 0))
    assert no_pull["rtc"] == {"used": False, "delay": 0, "leftover": 4}
    np.testing.assert_array_equal(no_pull["actions"], plain["actions"])


def test_samples_share_and_observations_have_their_own() -> None:
    side, given = policy(), Leftover(random_actions(6), 2)
    noise = np.random.default_rng(1).standard_normal((2, 2, HORIZON, 9), dtype=np.float32)
    both = side.infer([observation(0), observation(1)], noise=noise, num_samples=2, leftover=[None, given])
    assert both["rtc"] == [{"used": False, "delay": 0, "leftover": 0}, {"used": True, "delay": 2, "leftover": 6}]
    for row, leftover in enumerate((None, given)):
        for sample in range(2):
            alone = side.infer(observation(row), noise=noise[row, sample], leftover=leftover)["actions"]
            np.testing.assert_allclose(both["actions"][row, sample], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("leftover", "message"),
    [
        ([Leftover(np.zeros((3, 7)), 1)], "leftover is a list, expected a Leftover for one observation"),
        (np.zeros((3, 7)), "leftover is a ndarray"),
        (Leftover(np.zeros((3, 6)), 1), r"leftover actions have shape \[3, 6\], expected \[L, 7\]"),
    ],
)
def test_an_unusable_leftover_is_refused(leftover: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy().infer(observation(), leftover=leftover)


def test_a_batch_takes_one_leftover_each() -> None:
    side, batch, given = policy(), [observation(0), observation(1)], Leftover(np.zeros((3, 7)), 1)
    for leftover, message in [
        (given, "leftover is a Leftover, expected a list of 2, one for each observation"),
        ([given], r"leftover holds \['Leftover'\], expected 2"),
        ([given, np.zeros((3, 7))], r"leftover holds \['Leftover', 'ndarray'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            side.infer(batch, leftover=leftover)  # type: ignore[arg-type]


def test_the_example_of_the_docs() -> None:
    """docs/rtc.md, as it stands: each chunk begins where the robot is when it arrives."""
    text = (ROOT / "docs" / "rtc.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    executed: list[NDArray[np.float32]] = []
    names: dict[str, Any] = {"policy": policy(), "observe": observation, "execute": executed.extend}
    exec(example, names)
    assert len(executed) == 3 * 4 and all(action.shape == (ACTIONS,) for action in executed)
    # No latency has counted before the third chunk, so the first leftover had a delay of 0.
    assert names["reply"]["rtc"]["used"] and names["executed"] == names["reply"]["rtc"]["delay"]

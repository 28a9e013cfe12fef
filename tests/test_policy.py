"""Pi0Policy end to end on small checkpoints in the real layouts: files in, robot actions out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.config import EngineConfig, ModelType
from pi0_engine.measuring.cases import sample_reference
from pi0_engine.policy import Pi0Policy, SubtaskPlanner
from pi0_engine.reference.model import Pi0Reference
from pi0_engine.robots.normalization import NormStats
from pi0_engine.text.files import demo_tokenizer
from tests.support.checkpoints import tiny_config, write_lerobot, write_openpi

FLOAT32 = EngineConfig(dtype="float32")
STD, MEAN = 0.5, 0.1


def libero(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "observation/image": random.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        "observation/wrist_image": random.integers(0, 256, (64, 48, 3), dtype=np.uint8),
        "observation/state": random.uniform(-1, 1, 8),
        "prompt": "pick up the bowl",
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An openpi directory with statistics beside the weights."""
    directory = write_openpi(tmp_path_factory.mktemp("openpi"), tiny_config("pi0"))
    statistics = {"mean": [MEAN] * 8, "std": [STD] * 8, "q01": [-1.0] * 8, "q99": [1.0] * 8}
    stats = {"state": statistics, "actions": {name: values[:7] for name, values in statistics.items()}}
    (directory / "assets" / "robot").mkdir(parents=True)
    (directory / "assets" / "robot" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return directory


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Pi0Policy:
    return Pi0Policy.from_checkpoint(checkpoint, robot="libero", engine=FLOAT32, tokenizer=demo_tokenizer())


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((*shape, 32), dtype=np.float32)


def test_actions_are_the_references_in_robot_units(policy: Pi0Policy, checkpoint: Path) -> None:
    reply = policy.infer(libero(), noise=noise(50))
    inputs, _ = policy.transform.prepare(libero())
    source = open_checkpoint(checkpoint)
    import torch

    reference = Pi0Reference.from_tensors(source.config, source.tensor)
    raw = sample_reference(reference, inputs, torch.from_numpy(noise(1, 50)), 10)[0, :, :7].numpy()
    expected = raw * (STD + 1e-6) + MEAN
    assert reply["actions"].shape == (50, 7) and reply["actions"].dtype == np.float32
    np.testing.assert_allclose(reply["actions"], expected, atol=1e-4)
    np.testing.assert_array_equal(reply["state"], libero()["observation/state"].astype(np.float32))
    assert {"infer_ms", "prepare_ms", "vision_ms", "prefix_ms", "flow_ms"} <= reply["policy_timing"].keys()
    stages = sum(ms for name, ms in reply["policy_timing"].items() if name != "infer_ms")
    assert 0 < stages <= reply["policy_timing"]["infer_ms"]


def test_prompt_changes_the_actions_and_comes_from_call_observation_or_planner(policy: Pi0Policy) -> None:
    own = policy.infer(libero(), seed=0)["actions"]
    other = policy.infer(libero(), seed=0, prompt="open the drawer")["actions"]
    assert not np.allclose(own, other)
    said = policy.infer({**libero(), "prompt": "open the drawer"}, seed=0)["actions"]
    np.testing.assert_array_equal(said, other)


def test_seed_noise_and_own_generator(policy: Pi0Policy) -> None:
    first = policy.infer(libero(), seed=5)["actions"]
    np.testing.assert_array_equal(first, policy.infer(libero(), seed=5)["actions"])
    assert not np.allclose(first, policy.infer(libero(), seed=6)["actions"])
    assert not np.allclose(policy.infer(libero())["actions"], policy.infer(libero())["actions"])


def test_samples_share_an_observation_and_differ_by_noise(policy: Pi0Policy) -> None:
    three = policy.infer(libero(), noise=noise(3, 20), num_samples=3)["actions"]
    assert three.shape == (3, 20, 7)
    for sample in range(3):
        alone = policy.infer(libero(), noise=noise(3, 20)[sample])["actions"]
        np.testing.assert_allclose(three[sample], alone, atol=1e-5)


def test_a_batch_of_observations_is_each_alone(policy: Pi0Policy) -> None:
    given = noise(2, 1, 10)
    both = policy.infer([libero(0), libero(1)], noise=given)
    assert both["actions"].shape == (2, 10, 7) and both["state"].shape == (2, 8)
    for row in range(2):
        np.testing.assert_allclose(
            both["actions"][row], policy.infer(libero(row), noise=given[row, 0])["actions"], atol=1e-5
        )
    sampled = policy.infer([libero(0), libero(1)], seed=0, num_samples=2, num_steps=1)
    assert sampled["actions"].shape == (2, 2, 50, 7)


def test_number_of_steps(policy: Pi0Policy) -> None:
    ten = policy.infer(libero(), seed=0)["actions"]
    np.testing.assert_array_equal(ten, policy.infer(libero(), seed=0, num_steps=10)["actions"])
    assert not np.allclose(ten, policy.infer(libero(), seed=0, num_steps=2)["actions"], atol=1e-3)


def test_the_reply_is_the_callers(policy: Pi0Policy) -> None:
    first = policy.infer(libero(), seed=0)
    kept = first["actions"].copy()
    policy.infer(libero(1), seed=1)
    np.testing.assert_array_equal(first["actions"], kept)


def test_subtask_planner_is_asked_at_its_own_rate(checkpoint: Path) -> None:
    asked: list[Any] = []

    def plan(observation: Any) -> str:
        asked.append(observation)
        return "open the drawer"

    planned = Pi0Policy.from_checkpoint(
        checkpoint,
        robot="libero",
        engine=FLOAT32,
        tokenizer=demo_tokenizer(),
        subtask=SubtaskPlanner(plan, period_s=3600),
    )
    observation = libero()
    first = planned.infer(observation, seed=0)["actions"]
    planned.infer(observation, seed=0)
    assert len(asked) == 1 and asked[0] is observation
    np.testing.assert_array_equal(first, planned.infer(libero(), seed=0, prompt="open the drawer")["actions"])
    planned.reset()
    planned.infer(observation, seed=0)
    assert len(asked) == 2
    with pytest.raises(ValueError, match="serves one robot"):
        planned.infer([libero(), libero()])
    eager = SubtaskPlanner(plan, period_s=0)
    eager.instruction(observation), eager.instruction(observation)
    assert len(asked) == 4
    with pytest.raises(ValueError, match="period_s is -1"):
        SubtaskPlanner(plan, period_s=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": np.zeros((50, 7))}, r"noise has shape \[50, 7\], expected \[1, 1, horizon, 32\]"),
        ({"noise": np.zeros((2, 50, 32))}, r"noise has shape \[2, 50, 32\]"),
        ({"noise": np.zeros((50, 32)), "seed": 1}, "both noise and seed"),
        ({"noise": np.full((50, 32), np.nan)}, "noise contains NaN"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_errors_name_what_was_given(policy: Pi0Policy, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.infer(libero(), **arguments)


def test_a_refused_call_leaves_the_next_one_right(policy: Pi0Policy) -> None:
    before = policy.infer(libero(), seed=0)["actions"]
    with pytest.raises(ValueError, match="finite"):
        policy.infer({**libero(), "observation/state": np.full(8, np.nan)}, seed=0)
    np.testing.assert_array_equal(before, policy.infer(libero(), seed=0)["actions"])


def test_lerobot_directory_with_its_own_statistics_and_tokenizer(tmp_path: Path) -> None:
    """Mean 0.25, std 2 come from the state files that the processors name; 7 joints, so a robot of our own."""
    directory = write_lerobot(tmp_path / "lerobot", tiny_config("pi0"))
    robot = tmp_path / "seven.json"
    robot.write_text(
        json.dumps(
            {
                "slots": ["base_0_rgb"],
                "cameras": {"top": {"slot": "base_0_rgb"}},
                "state": {"keys": {"joints": 7}},
                "actions": {"dim": 7},
                "prompt": "wave",
            }
        )
    )
    arguments: dict[str, Any] = {
        "robot": robot,
        "config": tiny_config("pi0"),
        "engine": FLOAT32,
        "tokenizer": demo_tokenizer(),
    }
    observation = {"top": np.zeros((20, 20, 3), np.uint8), "joints": np.full(7, 0.25)}
    own = Pi0Policy.from_checkpoint(directory, **arguments).infer(observation, seed=0)["actions"]
    plain = Pi0Policy.from_checkpoint(directory, **arguments, norm_stats=NormStats.identity())
    raw = plain.infer({**observation, "joints": np.zeros(7)}, seed=0)["actions"]
    np.testing.assert_allclose(own, raw * 2 + 0.25, atol=1e-4)


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
def test_horizon_is_the_checkpoints_where_it_records_one(model_type: ModelType, tmp_path: Path) -> None:
    directory = write_openpi(tmp_path / "with_config", tiny_config(model_type))
    arguments: dict[str, Any] = {
        "robot": "droid",
        "engine": FLOAT32,
        "tokenizer": demo_tokenizer(),
        "norm_stats": NormStats.identity(),
    }
    assert Pi0Policy.from_checkpoint(directory, **arguments).config.action_horizon == 50
    policy = Pi0Policy.from_checkpoint(directory, **arguments)
    assert policy.config.discrete_state_input == (model_type == "pi05")

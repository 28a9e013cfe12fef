"""Episodes in closed loop: which action is carried out at which control step, and what the policy is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.demo.model import CONFIG
from pi0_engine.demo.rollout import Execution, Look, run_episode
from pi0_engine.demo.scene import Scene
from pi0_engine.rtc.schedule import Leftover
from tests.support.simulator import needs_simulator

HORIZON = CONFIG.action_horizon
SEED = 7


class Planned:
    """Answers each look with the next actions of a plan, by control step, and keeps what it was asked."""

    config: Pi0Config = CONFIG

    def __init__(self, scene: Scene, plan: Callable[[int, int], NDArray[np.float64]]) -> None:
        self.scene, self.plan = scene, plan
        self.looks: list[int] = []
        self.prompts: list[str] = []
        self.leftovers: list[Leftover | None] = []
        self.noises: list[NDArray[np.float32]] = []

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: NDArray[np.float32],
        num_steps: int | None = None,
        leftover: Leftover | None = None,
    ) -> dict[str, Any]:
        np.testing.assert_array_equal(observation["observation/state"], self.scene.state)
        self.looks.append(self.scene.steps)
        self.prompts.append(observation["prompt"])
        self.leftovers.append(leftover)
        self.noises.append(noise)
        return {"actions": self.plan(len(self.looks) - 1, self.scene.steps).astype(np.float32)}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene("drawer-close") as made:
        yield made


@pytest.fixture(scope="module")
def demonstration(scene: Scene) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The expert's actions, rounded as a policy's, and the states behind each of them."""
    scene.reset(SEED)
    actions, states = [], []
    while not scene.success:
        actions.append(scene.expert_action().astype(np.float32).astype(np.float64))
        scene.step(actions[-1])
        states.append(scene.state)
    return np.array(actions), np.array(states)


def replayed(scene: Scene, actions: NDArray[np.float64]) -> Planned:
    padded = np.concatenate([actions, np.zeros((HORIZON, 4))])
    return Planned(scene, lambda _, step: padded[step : step + HORIZON])


@needs_simulator
@pytest.mark.parametrize("rtc", [False, True])
@pytest.mark.parametrize(("execute", "latency"), [(1, 0), (8, 0), (16, 0), (8, 3), (8, 8), (5, 4), (12, 4), (1, 1)])
def test_every_action_is_carried_out_at_its_control_step(
    scene: Scene, demonstration: tuple[NDArray[np.float64], NDArray[np.float64]], execute: int, latency: int, rtc: bool
) -> None:
    actions, states = demonstration
    policy = replayed(scene, actions)
    seen: list[NDArray[np.float64]] = []
    episode = run_episode(
        scene,
        policy,
        SEED,
        execution=Execution(execute=execute, latency=latency, rtc=rtc),
        on_step=lambda after, _: seen.append(after.state),
    )
    assert episode.success and episode.steps == len(actions) > 20
    np.testing.assert_array_equal(np.array(seen), states)
    assert policy.looks == [execute * number for number in range(len(policy.looks))]
    assert episode.inferences == len(policy.looks) == -(-len(actions) // execute)
    assert policy.leftovers[0] is None
    for step, leftover in zip(policy.looks[1:], policy.leftovers[1:], strict=True):
        assert (leftover is not None) == rtc
        if leftover is not None:
            assert leftover.delay == latency and len(leftover) == HORIZON - execute
            begun = min(len(leftover), len(actions) - step)
            np.testing.assert_array_equal(leftover.actions[:begun], actions[step : step + begun].astype(np.float32))


@needs_simulator
@pytest.mark.parametrize(("execute", "latency"), [(8, 0), (8, 3), (8, 8)])
def test_the_next_chunk_takes_over_when_its_latency_has_passed(scene: Scene, execute: int, latency: int) -> None:
    """Action k of chunk n is n / 10 + k / 100 upwards: every command tells where it comes from."""
    index = np.arange(HORIZON)[:, None] / 100 * np.array([0.0, 0.0, 1.0, 0.0])
    policy = Planned(scene, lambda number, _: index + np.array([0.0, 0.0, 0.1 * number, 0.0]))
    told: list[float] = []
    episode = run_episode(
        scene,
        policy,
        SEED,
        execution=Execution(execute=execute, latency=latency),
        most_steps=3 * execute + 2,
        on_step=lambda _, action: told.append(float(action[2])),
    )
    assert not episode.success and episode.steps == len(told) == 3 * execute + 2
    chunks = [max((step - latency) // execute, 0) for step in range(episode.steps)]
    expected = [0.1 * chunk + (step - chunk * execute) / 100 for step, chunk in enumerate(chunks)]
    np.testing.assert_allclose(told, expected, atol=1e-6)
    # From action `execute + latency - 1` of one chunk to action `latency` of the next.
    assert episode.seam_jump == pytest.approx(abs(0.1 - (execute - 1) / 100), abs=1e-6)


@needs_simulator
def test_the_same_seed_is_the_same_episode_with_the_same_noise(scene: Scene) -> None:
    def run(seed: int) -> tuple[list[NDArray[np.float32]], NDArray[np.float64]]:
        policy = Planned(scene, lambda number, _: policy.noises[number][:, :4])
        run_episode(scene, policy, seed, most_steps=20)
        return policy.noises, scene.state

    noises, state = run(SEED)
    run(SEED + 1)
    again, state_again = run(SEED)
    np.testing.assert_array_equal(noises, again)
    np.testing.assert_array_equal(state, state_again)
    assert noises[0].shape == (HORIZON, CONFIG.action_dim) and noises[0].dtype == np.float32
    assert not np.array_equal(noises[0], noises[1])


@needs_simulator
def test_the_prompt_is_the_scenes_or_the_one_given(scene: Scene) -> None:
    idle = Planned(scene, lambda _number, _step: np.zeros((HORIZON, 4)))
    episode = run_episode(scene, idle, SEED, most_steps=10)
    assert idle.prompts == ["close the drawer"] * 2 == [episode.prompt] * 2
    idle.prompts.clear()
    episode = run_episode(scene, idle, SEED, prompt="open the drawer", most_steps=10)
    assert idle.prompts == ["open the drawer"] * 2 == [episode.prompt] * 2
    assert (episode.task, episode.seed, episode.success, episode.steps) == ("drawer-close", SEED, False, 10)
    assert episode.seam_jump == 0 and episode.chunk_ms > 0


@needs_simulator
def test_looks_and_steps_are_reported(scene: Scene, demonstration: tuple[NDArray[np.float64], Any]) -> None:
    looks: list[Look] = []
    steps: list[int] = []
    policy = replayed(scene, demonstration[0])
    run_episode(
        scene, policy, SEED, most_steps=20, on_look=looks.append, on_step=lambda after, _: steps.append(after.steps)
    )
    assert [look.step for look in looks] == [0, 8, 16] and steps == list(range(1, 21))
    assert looks[1].reply["actions"].shape == (HORIZON, 4)
    assert (looks[0].observation["observation/top"] != looks[2].observation["observation/top"]).any()


@needs_simulator
def test_a_touched_pillar_ends_the_episode() -> None:
    """The expert's way straight ahead, without the detour."""
    with Scene("go-around") as scene:
        ahead = np.zeros((HORIZON, 4))
        ahead[:, 1] = 1.0
        episode = run_episode(scene, Planned(scene, lambda _number, _step: ahead), SEED)
        assert scene.touched and not episode.success and episode.steps < 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"execute": 0}, "execute is 0"),
        ({"latency": -1}, "latency -1"),
        ({"execute": 4, "latency": 5}, r"latency is 5 .* at most execute \(4\)"),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_an_execution_that_cannot_be(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Execution(**given)


@pytest.mark.parametrize(("execute", "latency"), [(17, 0), (8, 9), (12, 5)])
def test_a_chunk_must_last_until_the_next_is_there(execute: int, latency: int) -> None:
    with pytest.raises(ValueError, match=r"at most"):
        Execution(execute=execute, latency=latency).check(HORIZON)

"""The simulated scenes: what a policy is shown, and that the scripted experts succeed in all of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from pi0_engine.demo.scene import ACTION_DIM, CAMERAS, FRAME_SIZE, STATE_DIM, Scene
from pi0_engine.demo.tasks import TASKS, get_task
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.observation import read_observation
from tests.support.paths import ROOT
from tests.support.simulator import needs_simulator, why_not


def run_expert(scene: Scene, seed: int, most_steps: int = 200) -> None:
    scene.reset(seed)
    while not scene.success and not scene.touched and scene.steps < most_steps:
        scene.step(scene.expert_action())


@needs_simulator
@pytest.mark.parametrize("name", TASKS)
def test_every_expert_succeeds(name: str) -> None:
    with Scene(name) as scene:
        for seed in range(3):
            run_expert(scene, seed)
            assert scene.success, (name, seed, scene.steps)


@needs_simulator
def test_an_observation_is_what_the_robot_declares() -> None:
    robot = get_robot("metaworld")
    assert [camera.key for camera in robot.cameras] == list(CAMERAS)
    assert (robot.state_dim, robot.action_dim) == (STATE_DIM, ACTION_DIM)
    with Scene("drawer-close") as scene:
        seen = scene.reset(5)
        read = read_observation(seen, robot)
        assert read.prompt == "close the drawer" and read.state.shape == (4,)
        assert {frame.shape for frame in read.frames.values()} == {(FRAME_SIZE, FRAME_SIZE, 3)}
        # Nothing else is told: where the drawer is, has to be seen.
        assert set(seen) == {*CAMERAS, "observation/state", "prompt"}
        assert scene.film(96, 48).shape == (48, 96, 3)


@needs_simulator
def test_a_seed_is_a_scene() -> None:
    def first(name: str, seed: int) -> dict[str, Any]:
        with Scene(name) as scene:
            return scene.reset(seed)

    one, same, other = first("reach", 3), first("reach", 3), first("reach", 4)
    for key in CAMERAS:
        np.testing.assert_array_equal(one[key], same[key])
    assert (one["observation/top"] != other["observation/top"]).any()


@needs_simulator
def test_the_two_faucet_tasks_begin_alike() -> None:
    """Only the instruction tells them apart: no marker of a goal is drawn."""
    with Scene("faucet-open") as opening, Scene("faucet-close") as closing:
        seen = opening.reset(0), closing.reset(0)
        difference = np.abs(seen[0]["observation/side"].astype(int) - seen[1]["observation/side"])
        assert (difference.max(axis=-1) > 30).mean() < 0.02
        markers = opening._environment.model.site_rgba[:, 3]
        assert not markers.any()


@needs_simulator
def test_the_pillar_is_passed_on_both_sides_and_not_touched() -> None:
    with Scene("go-around") as scene:
        sides = set()
        for seed in range(6):
            scene.reset(seed)
            sides.add(scene.expert.side)
            furthest = 0.0
            while not scene.success and scene.steps < 200:
                scene.step(scene.expert_action())
                furthest = max(furthest, scene.state[0] * scene.expert.side)
            assert scene.success and furthest > 0.1
        assert sides == {-1, 1}
        scene.reset(0)
        for _ in range(60):
            scene.step([0.0, 1.0, 0.0, 0.0])  # straight ahead
        assert scene.touched and not scene.success


@needs_simulator
@pytest.mark.parametrize("action", [[0.0] * 3, [0.0] * 5, [np.nan, 0, 0, 0], np.zeros((1, 4))])
def test_actions_that_cannot_be_carried_out(action: Any) -> None:
    with Scene("reach") as scene:
        scene.reset(0)
        with pytest.raises(ValueError, match="expected 4 finite numbers"):
            scene.step(action)


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ValueError, match="task 'juggle' is none of reach, button-press"):
        get_task("juggle")


def test_instructions_are_of_one_task_only() -> None:
    prompts = [prompt for task in TASKS.values() for prompt in task.prompts]
    assert len(set(prompts)) == len(prompts) and min(len(task.prompts) for task in TASKS.values()) >= 3


def test_without_the_simulator_the_extra_is_named() -> None:
    program = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("mujoco", "metaworld") else real(name, *rest)
from pi0_engine.demo.scene import Scene
try:
    Scene("reach")
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "the simulator needs metaworld and mujoco: pip install 'pi0-engine[sim]'"


def run_program(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a new process, which knows nothing of this one's renderer."""
    names = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "PI0_ENGINE_RENDERED", "DISPLAY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run([sys.executable, "-c", program], env={**clean, **environment}, capture_output=True, text=True)


def loaded(before: str = "", **environment: str) -> str:
    """What a new process says of the simulator: the backend that renders, or why none does."""
    program = f"""
{before}
import os
from pi0_engine.demo.scene import load_simulator
try:
    load_simulator()
    print("renders with", os.environ["MUJOCO_GL"])
except ValueError as error:
    print(error)
"""
    done = run_program(program, **environment)
    assert before or done.stderr == "", "the reason is all that is said"
    return done.stdout.strip()


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs the extra sim")
@pytest.mark.parametrize("backend", ["foo", "glfw", "off"])
def test_a_backend_that_cannot_render_is_named(backend: str) -> None:
    said = loaded(MUJOCO_GL=backend)
    assert said.startswith(f"mujoco cannot render here (MUJOCO_GL={backend}: ") and "libegl1" in said


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs the extra sim")
def test_osmesa_is_tried_where_egl_was_and_failed() -> None:
    """What comes of it is what comes of OSMesa alone."""
    alone, after_egl = loaded(MUJOCO_GL="osmesa"), loaded(MUJOCO_EGL_DEVICE_ID="99")
    if alone == "renders with osmesa":
        assert after_egl == alone
    else:
        why = alone[alone.index("MUJOCO_GL=osmesa: ") :]
        assert after_egl.endswith(why)
        egl = loaded(MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99")
        assert egl[egl.index("MUJOCO_GL=egl: ") : egl.rindex(")")] in after_egl
        if not why_not():  # EGL is there, and what fails is the device
            assert "MUJOCO_GL=egl: The MUJOCO_EGL_DEVICE_ID" in after_egl


@needs_simulator
def test_a_process_that_has_no_renderer_any_more_is_told_so() -> None:
    said = loaded(before="import mujoco")
    assert "does not render in this process, expected mujoco not to be imported before" in said


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs the extra sim")
def test_where_the_simulator_is_required_its_tests_fail_and_are_not_skipped() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support.simulator import needs_simulator
print(needs_simulator)
"""
    given = {"MUJOCO_GL": "foo", "PI0_REQUIRE_SIMULATOR": ""}
    skipping = run_program(program, **given)
    assert skipping.returncode == 0 and "args=(True,)" in skipping.stdout and "MUJOCO_GL=foo" in skipping.stdout
    failing = run_program(program, **{**given, "PI0_REQUIRE_SIMULATOR": "1"})
    assert failing.returncode != 0
    assert "PI0_REQUIRE_SIMULATOR is 1, and there is no simulator: mujoco cannot render here" in failing.stderr

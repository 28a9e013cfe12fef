"""One task in the simulator: what the cameras and the arm say, what the arm is told, whether the task is done.

A policy sees two small camera frames, the hand's position and the gripper's opening, and the instruction. Where the
object and the goal are, it has to see.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.demo.expert import Expert
from pi0_engine.demo.tasks import get_task

#: Side of the frames that a policy sees, in pixels.
FRAME_SIZE = 64
#: Actions per second: Meta-World simulates 5 steps of 2.5 ms with each.
CONTROL_HZ = 80.0
#: Hand displacement in x, y and z, and gripper effort, each in [-1, 1]; 1 moves the hand's target by a centimetre.
ACTION_DIM = 4
#: Position of the hand in metres, and the gripper's opening from 0 to 1.
STATE_DIM = 4
#: Camera key of the observation -> where it looks at (m), distance (m), azimuth and elevation (degrees).
CAMERAS = {
    "observation/top": ((0.0, 0.70, 0.10), 1.15, 90.0, -89.0),
    "observation/side": ((0.0, 0.70, 0.12), 1.05, 150.0, -30.0),
}
#: The ball to be reached: Meta-World's, red as the arm and of 2 cm, is one pixel. In ours the fingertips have to be.
_BALL_RADIUS, _BALL_COLOUR = 0.05, (0.0, 0.8, 0.0, 1.0)
#: The pillar of the tasks with an obstacle: its centre and half its sides, in metres.
PILLAR_CENTRE, PILLAR_HALF = (0.0, 0.72, 0.15), (0.04, 0.015, 0.15)

#: Environment variable: the ``MUJOCO_GL`` that rendered when it was tried. Processes of a pool need not try again.
_RENDERED = "PI0_ENGINE_RENDERED"
#: Prints why it cannot render; each backend fails in its own way where its library is missing.
_TRIAL = """
try:
    import mujoco
    mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
except Exception as error:
    print(error)
    raise
"""


class Scene:
    """A task with its robot. Use it in a ``with`` block: it holds a rendering context.

    Args:
        task: a name in :data:`pi0_engine.demo.tasks.TASKS`.
        frame_size: side of the observation's frames, in pixels.

    Attributes:
        prompt: the instruction; :meth:`reset` sets the task's first, and it may be changed at any time.

    Raises:
        ValueError: no such task; the simulator is not installed, or it cannot render here.
    """

    def __init__(self, task: str, *, frame_size: int = FRAME_SIZE) -> None:
        self.name, self.task = task, get_task(task)
        self._mujoco = load_simulator()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self._environment: Any = ALL_V3_ENVIRONMENTS[f"{self.task.environment}-v3"]()
        # What Meta-World's benchmarks set in ``set_task``; here every reset draws a goal.
        self._environment._set_task_called = True
        self._environment._freeze_rand_vec = False
        self._environment.seeded_rand_vec = True
        self._cheapen()
        self._renderer = self._make_renderer(frame_size, frame_size)
        self._film: Any = None
        self._cameras = {name: self._camera(*view) for name, view in CAMERAS.items()}
        self.prompt = self.task.prompts[0]

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the rendering context."""
        for renderer in (self._renderer, self._film):
            if renderer is not None:
                renderer.close()

    def reset(self, seed: int) -> dict[str, Any]:
        """Begin an episode: object and goal where ``seed`` puts them. Returns the first observation."""
        self._environment.seed(seed)
        self._told, _ = self._environment.reset()
        self._place()
        self.steps, self.success, self.touched = 0, False, False
        self.prompt = self.task.prompts[0]
        self.expert = Expert(self.task, np.random.default_rng(seed))
        return self.observe()

    def step(self, action: ArrayLike) -> None:
        """Carry out one action, float [4]; beyond [-1, 1] it is clipped, as Meta-World does.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (ACTION_DIM,) or not np.isfinite(values).all():
            raise ValueError(f"the action is {values.tolist()}, expected {ACTION_DIM} finite numbers")
        self._told, _, _, _, info = self._environment.step(np.clip(values, -1.0, 1.0))
        self.steps += 1
        self.touched = self.touched or (self.task.obstacle and self._pillar_is_touched())
        # Knocking the pillar is a failure for good.
        self.success = self.success or (bool(info["success"]) and not self.touched)

    def observe(self) -> dict[str, Any]:
        """What a policy is given: ``observation/top`` and ``/side`` uint8 [size, size, 3], ``/state`` float64 [4], and
        ``prompt``.
        """
        frames = {name: self._render(self._renderer, camera) for name, camera in self._cameras.items()}
        return {**frames, "observation/state": self.state, "prompt": self.prompt}

    @property
    def state(self) -> NDArray[np.float64]:
        """float64 [4]: hand position in metres, gripper opening from 0 to 1."""
        return np.array(self._told[:STATE_DIM], dtype=np.float64)

    def expert_action(self) -> NDArray[np.float64]:
        """What the task's scripted expert, which knows where everything is, does now: float64 [4] in [-1, 1]."""
        # Meta-World keeps the goal from whoever has not been given a task of its benchmarks.
        return self.expert.action(np.append(self._told[:-3], self._environment._target_pos))

    def film(self, width: int = 480, height: int = 360) -> NDArray[np.uint8]:
        """The scene for people: uint8 [height, width, 3]."""
        if self._film is None:
            self._film = self._make_renderer(width, height)
        return self._render(self._film, self._cameras["observation/side"])

    def joint_degrees(self, joint: str) -> float:
        """The angle of a hinge of the scene, by mujoco's name."""
        return math.degrees(float(self._environment.data.joint(joint).qpos[0]))

    def _cheapen(self) -> None:
        """Without shadows, reflections and multisampling a processor renders 20 times as many frames."""
        model = self._environment.model
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.mat_reflectance[:] = 0.0

    def _make_renderer(self, width: int, height: int) -> Any:
        model = self._environment.model
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        return self._mujoco.Renderer(model, height, width)

    def _camera(self, lookat: tuple[float, ...], distance: float, azimuth: float, elevation: float) -> Any:
        camera = self._mujoco.MjvCamera()
        camera.lookat[:], camera.distance = lookat, distance
        camera.azimuth, camera.elevation = azimuth, elevation
        return camera

    def _render(self, renderer: Any, camera: Any) -> NDArray[np.uint8]:
        renderer.update_scene(self._environment.data, camera)
        frame: NDArray[np.uint8] = renderer.render().copy()
        return frame

    def _place(self) -> None:
        """What is not as in Meta-World: no markers but the ball, and the pillar."""
        model = self._environment.model
        model.site_rgba[:, 3] = 0.0
        if self.task.shows_goal:
            goal = model.site("goal").id
            model.site_rgba[goal], model.site_size[goal] = _BALL_COLOUR, _BALL_RADIUS
        if self.task.obstacle:
            pillar = model.body("wall").id
            model.body_pos[pillar] = PILLAR_CENTRE
            model.geom_size[model.geom_bodyid == pillar] = PILLAR_HALF
        self._mujoco.mj_forward(model, self._environment.data)

    def _pillar_is_touched(self) -> bool:
        model, data = self._environment.model, self._environment.data
        geoms = np.flatnonzero(model.geom_bodyid == model.body("wall").id)
        return bool(np.isin(data.contact.geom, geoms).any())


def load_simulator() -> ModuleType:
    """mujoco, set up to render without a display: as ``MUJOCO_GL`` says, otherwise by EGL or, failing that, OSMesa.

    Raises:
        ValueError: the extra ``sim`` is not installed, or nothing here can render.
    """
    missing = [name for name in ("metaworld", "mujoco") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the simulator needs {' and '.join(missing)}: pip install 'pi0-engine[sim]'")
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")  # its LLVM crashes where Mesa's, which renders, was loaded first
    given = os.environ.get("MUJOCO_GL")
    if not given or os.environ.get(_RENDERED) != given:
        given = _working_backend((given,) if given else ("egl", "osmesa"))
        os.environ["MUJOCO_GL"] = os.environ[_RENDERED] = given
    import mujoco

    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except Exception as error:  # tried in another process, it worked
        raise ValueError(
            f"MUJOCO_GL={given} does not render in this process, expected mujoco not to be imported before: {error}"
        ) from error
    return mujoco


def _working_backend(backends: tuple[str, ...]) -> str:
    """The first that renders. Each is tried in a process of its own: one that failed here would be in others' way."""
    errors = []
    for backend in backends:
        program = [sys.executable, "-c", _TRIAL]
        trial = subprocess.run(program, env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, text=True)
        if trial.returncode == 0:
            return backend
        errors.append(f"MUJOCO_GL={backend}: {trial.stdout.strip() or f'it ends with status {trial.returncode}'}")
    raise ValueError(
        f"mujoco cannot render here ({'; '.join(errors)}): expected Mesa's EGL or OSMesa, "
        "on Debian and Ubuntu `apt-get install libegl1 libgl1-mesa-dri`"
    )

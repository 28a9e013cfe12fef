"""What the policy sees at the beginning of an episode, kept in the package for machines without the simulator.

``python -m pi0_engine.demo.recorded`` records all of it anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pi0_engine.demo.collect import FIRST_UNSEEN_SEED
from pi0_engine.demo.scene import CAMERAS, Scene
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.demo.tasks import TASKS, get_task

#: ``TASK.png`` has the cameras' frames side by side, ``states.json`` the robot's state by task.
FOLDER = CHECKPOINT.parent / "metaworld_observations"


def recorded_observation(task: str) -> dict[str, Any]:
    """The first observation of a scene of this task, as :meth:`Scene.observe` gives it.

    Raises:
        ValueError: no such task.
    """
    prompt = get_task(task).prompts[0]
    with Image.open(FOLDER / f"{task}.png") as image:
        frames = np.split(np.asarray(image.convert("RGB")), len(CAMERAS), axis=1)
    state = json.loads((FOLDER / "states.json").read_text())[task]
    return {**dict(zip(CAMERAS, frames, strict=True)), "observation/state": np.array(state), "prompt": prompt}


def record(folder: Path) -> None:
    """Write the observations of every task's first unseen scene."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {}
    for task in TASKS:
        with Scene(task) as scene:
            observation = scene.reset(FIRST_UNSEEN_SEED)
        frames = np.concatenate([observation[camera] for camera in CAMERAS], axis=1)
        Image.fromarray(frames).save(folder / f"{task}.png", optimize=True)
        states[task] = observation["observation/state"].tolist()
    (folder / "states.json").write_text(json.dumps(states, indent=2) + "\n")


if __name__ == "__main__":
    record(FOLDER)
    sys.exit(0)

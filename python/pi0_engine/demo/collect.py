"""Demonstrations of the scripted experts: ``python -m pi0_engine.demo.collect OUTPUT``.

Two kinds, for the two stages of training. ``noisy``: what is carried out is the expert's action plus noise, what is
recorded the expert's own, so that the policy sees states off the path and the way back. ``clean``: the expert alone.
In both the arm is now and then pushed somewhere else, which is not recorded: recovery from there is.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pi0_engine.demo.dataset import Demonstrations
from pi0_engine.demo.scene import CAMERAS, Scene, load_simulator
from pi0_engine.demo.tasks import TASKS, get_task

Style = Literal["noisy", "clean"]

#: Episodes of demonstrations have smaller seeds than this, those of evaluations have it or larger ones.
FIRST_UNSEEN_SEED = 1_000_000
#: Each seed of an evaluation has so many scenes from there on.
_UNSEEN_EACH = 10_000
#: Of those before it, each collection's seed has so many: half for noisy and half for clean episodes.
_SEEDS_EACH = FIRST_UNSEEN_SEED // 100
#: Of one task and style, so that those that fail can be tried again in scenes of their own.
_MOST_EPISODES = 2000
#: An observation is recorded at every second action: neighbours are nearly equal, and rendering is what takes time.
STRIDE = 2
#: An episode that has not succeeded by then is dropped. The experts need 30 to 130 actions.
_MOST_STEPS = 250
#: Goes on after success, so that chunks that begin before it are complete.
_STEPS_AFTER = 16
#: Pushes: at the beginning, and with this chance at every step; so many steps each.
_FIRST_PUSH, _PUSH_CHANCE, _PUSH = (0, 20), {"noisy": 0.02, "clean": 0.008}, (4, 12)
#: Standard deviation of the noise, drawn for each noisy episode.
_NOISE = (0.1, 0.5)


@dataclass(frozen=True)
class _Job:
    task: str
    style: Style
    seed: int


def collect_episode(scene: Scene, style: Style, seed: int) -> Demonstrations | None:
    """One episode of a scene's expert; None if it did not succeed.

    Every stretch between two pushes is a segment: a chunk of actions never reaches over its end.
    """
    scene.reset(seed)
    rng = np.random.default_rng([seed, 1])
    noise = rng.uniform(*_NOISE) if style == "noisy" else 0.0
    frames, states, starts = [], [], []
    actions: list[NDArray[np.float64]] = []
    ends: list[int] = []  # where segments end, in recorded actions
    _push(scene, rng, int(rng.integers(*_FIRST_PUSH)))
    left = _STEPS_AFTER
    while left and scene.steps < _MOST_STEPS and not scene.touched:
        if rng.random() < _PUSH_CHANCE[style] and not scene.success:
            ends.append(len(actions))
            _push(scene, rng, int(rng.integers(*_PUSH)))
        action = scene.expert_action()
        if len(actions) % STRIDE == 0:
            observation = scene.observe()
            frames.append(np.stack([observation[camera] for camera in CAMERAS]))
            states.append(observation["observation/state"])
            starts.append(len(actions))
        actions.append(action)
        scene.step(action + noise * rng.standard_normal(len(action)))
        left -= scene.success
    if not scene.success:
        return None
    bounds = np.array([*ends, len(actions)])
    first = np.array(starts)
    return Demonstrations(
        frames=np.stack(frames),
        states=np.stack(states).astype(np.float32),
        actions=np.stack(actions).astype(np.float32),
        first=first.astype(np.int64),
        end=bounds[np.searchsorted(bounds, first, side="right")].astype(np.int64),
    )


def collect(
    output: Path,
    *,
    tasks: list[str],
    episodes: int,
    seed: int = 0,
    processes: int | None = None,
    progress: bool = True,
) -> None:
    """Write ``TASK-STYLE.safetensors`` with ``episodes * task.share`` successful episodes of each task in each style.

    Args:
        output: a folder; files of the same name are replaced.
        seed: decides all of it, whatever the number of processes.
        processes: None takes as many as there are processors.

    Raises:
        ValueError: a task or number that there is not, or a task whose expert hardly ever succeeds; no simulator.
    """
    wanted = {task: episodes * get_task(task).share for task in tasks}
    if episodes < 1 or max(wanted.values()) > _MOST_EPISODES or not 0 <= seed < 100:
        raise ValueError(
            f"episodes is {episodes}, seed {seed}: expected at least 1, at most {_MOST_EPISODES} of any task with its "
            "share, and a seed of 0 to 99"
        )
    load_simulator()  # here it is one error where it fails
    output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(processes or os.cpu_count()) as pool,
        tqdm(total=2 * sum(wanted.values()), unit="episode", disable=not progress) as bar,
    ):
        for task, count in wanted.items():
            for style in get_args(Style):
                kept: list[Demonstrations] = []
                jobs = _jobs(task, style, seed, most=2 * count + 10)
                # As many at a time as are still wanted; those that failed are tried again in other scenes.
                while round_ := list(itertools.islice(jobs, count - len(kept))):
                    for demonstrations in pool.imap(_run, round_):
                        if demonstrations is not None:
                            kept.append(demonstrations)
                            bar.update()
                if len(kept) < count:
                    raise ValueError(f"the expert of {task!r} succeeded {len(kept)} times, expected {count}")
                Demonstrations.join(kept).save(output / f"{task}-{style}.safetensors")


def unseen_seeds(episodes: int, seed: int) -> range:
    """The scenes of an evaluation: with another ``seed`` none of them, however many ``episodes`` either has.

    Raises:
        ValueError: less than one episode or more than 10,000, or a negative seed.
    """
    if not 1 <= episodes <= _UNSEEN_EACH or seed < 0:
        raise ValueError(f"episodes is {episodes} and seed {seed}, expected 1 to {_UNSEEN_EACH} and at least 0")
    first = FIRST_UNSEEN_SEED + seed * _UNSEEN_EACH
    return range(first, first + episodes)


def _jobs(task: str, style: Style, seed: int, most: int) -> Iterator[_Job]:
    """Scenes of their own for every seed and style."""
    first = seed * _SEEDS_EACH + (style == "clean") * (_SEEDS_EACH // 2)
    return (_Job(task, style, first + episode) for episode in range(most))


_scenes: dict[str, Scene] = {}


def _run(job: _Job) -> Demonstrations | None:
    """In a process of the pool, which keeps the scene of the task at hand."""
    if job.task not in _scenes:
        for scene in _scenes.values():
            scene.close()
        _scenes.clear()
        _scenes[job.task] = Scene(job.task)
    return collect_episode(_scenes[job.task], job.style, job.seed)


def _push(scene: Scene, rng: np.random.Generator, steps: int) -> None:
    """Move the arm somewhere, slowly enough not to leave the scene."""
    direction = np.append(rng.uniform(-1.0, 1.0, 3), rng.uniform(-1.0, 1.0))
    for _ in range(steps):
        if not scene.success:
            scene.step(direction)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pi0_engine.demo.collect", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the demonstrations: about 3 GB")
    parser.add_argument("--tasks", default="all", help="names with commas between them, or all")
    parser.add_argument("--episodes", type=int, default=100, help="per task and style, times its share (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="0 to 99 (default 0)")
    parser.add_argument("--processes", type=int, help="default: as many as there are processors")
    given = parser.parse_args(arguments)
    tasks = list(TASKS) if given.tasks == "all" else given.tasks.split(",")
    try:
        collect(given.output, tasks=tasks, episodes=given.episodes, seed=given.seed, processes=given.processes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

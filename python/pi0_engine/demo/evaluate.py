"""How often a policy succeeds: many episodes of many tasks, in several processes, with confidence intervals."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from pi0_engine.config import DtypeName, EngineConfig, SolverName
from pi0_engine.demo.collect import unseen_seeds
from pi0_engine.demo.policies import load_policy, load_reference
from pi0_engine.demo.rollout import ChunkPolicy, Episode, Execution, run_episode
from pi0_engine.demo.scene import Scene, load_simulator
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.demo.tasks import TASKS, get_task
from pi0_engine.rtc.guidance import check_guidable

Backend = Literal["auto", "torch", "triton", "reference"]
#: Task -> its episodes, in the order of their seeds.
Outcomes = dict[str, list[Episode]]


@dataclass(frozen=True)
class Setting:
    """One way to run the model.

    Attributes:
        backend: of the engine, or ``"reference"``.
        device, dtype, solver: as of :class:`EngineConfig`. The reference runs in float32 on the CPU.
        execution: how its chunks are carried out.

    Raises:
        ValueError: for the reference another device or dtype, or real-time chunking, which only the engine has; for
            real-time chunking another solver than Euler's.
    """

    backend: Backend = "auto"
    device: str = "cpu"
    dtype: DtypeName = "auto"
    solver: SolverName = "euler"
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.backend == "reference" and (
            self.device != "cpu" or self.dtype not in ("auto", "float32") or self.execution.rtc
        ):
            rtc = " with rtc" if self.execution.rtc else ""
            raise ValueError(
                f"the reference is asked for on {self.device} in {self.dtype}{rtc}, expected cpu, float32 and no rtc"
            )
        if self.execution.rtc:
            check_guidable(self.solver)

    def policy(self, checkpoint: str | Path) -> ChunkPolicy:
        """What is run. Raises ValueError where it cannot run here."""
        if self.backend == "reference":
            return load_reference(checkpoint, self.solver)
        config = EngineConfig(device=self.device, dtype=self.dtype, backend=self.backend, solver=self.solver)
        return load_policy(checkpoint, config)


def evaluate(
    settings: Mapping[str, Setting],
    *,
    tasks: Sequence[str] = tuple(TASKS),
    episodes: int = 50,
    seed: int = 0,
    checkpoint: str | Path = CHECKPOINT,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Outcomes]:
    """Run every setting in the same scenes, none of which training has seen, from the same noise.

    Args:
        settings: by name.
        tasks: names in :data:`TASKS`.
        episodes: of each task, at most 10,000.
        seed: 0, 1, ...: other scenes each.
        checkpoint: what to run.
        processes: None takes as many as there are processors; each runs on one.
        progress: show a bar.

    Returns:
        The episodes of each setting.

    Raises:
        ValueError: a task, a checkpoint or a number that cannot be used; no simulator.
    """
    seeds = unseen_seeds(episodes, seed)
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}, expected at least 1")
    if not tasks or not settings:
        raise ValueError("there is nothing to evaluate, expected at least one task and one setting")
    for task in tasks:
        get_task(task)
        if list(tasks).count(task) > 1:
            raise ValueError(f"task {task!r} is given {list(tasks).count(task)} times, expected each task once")
    # Here what fails is one error; processes of a pool would die of it again and again.
    for setting in settings.values():
        setting.execution.check(setting.policy(checkpoint).config.action_horizon)
    load_simulator()
    jobs = [(name, task, number) for task, name, number in itertools.product(tasks, settings, seeds)]
    outcomes: dict[str, Outcomes] = {name: {task: [] for task in tasks} for name in settings}
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(processes or os.cpu_count(), _begin, (dict(settings), str(checkpoint))) as pool,
        tqdm(total=len(jobs), unit="episode", disable=not progress) as bar,
    ):
        for (name, task, _), episode in zip(jobs, pool.imap(_run, jobs), strict=True):
            outcomes[name][task].append(episode)
            bar.update()
        pool.close()
        pool.join()
    return outcomes


def summarize(outcomes: Outcomes) -> dict[str, Any]:
    """Plain numbers of one setting, for JSON: ``tasks`` by name, and ``all`` of them together.

    Each has ``episodes``, ``successes``, their ``rate`` and its 95 % interval from ``low`` to ``high``, the mean number
    of control ``steps`` to a success (None without one), and the means of ``seam_jump`` and ``chunk_ms`` (see Episode).
    """
    every = [episode for episodes in outcomes.values() for episode in episodes]
    return {"tasks": {task: _summary(episodes) for task, episodes in outcomes.items()}, "all": _summary(every)}


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % confidence interval of a success rate, after Wilson (1927)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _summary(episodes: Sequence[Episode]) -> dict[str, Any]:
    successes = sum(episode.success for episode in episodes)
    low, high = wilson_interval(successes, len(episodes))
    # Of those that succeed: the others take as long as they may.
    steps = [episode.steps for episode in episodes if episode.success]
    return {
        "episodes": len(episodes),
        "successes": successes,
        "rate": round(successes / len(episodes), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "steps": round(float(np.mean(steps)), 1) if steps else None,
        "seam_jump": round(float(np.mean([episode.seam_jump for episode in episodes])), 4),
        "chunk_ms": round(float(np.mean([episode.chunk_ms for episode in episodes])), 2),
    }


_policies: dict[str, tuple[ChunkPolicy, Execution]] = {}
_scenes: dict[str, Scene] = {}


def _begin(settings: dict[str, Setting], checkpoint: str) -> None:
    """In every process of the pool."""
    torch.set_num_threads(1)
    for name, setting in settings.items():
        _policies[name] = setting.policy(checkpoint), setting.execution


def _run(job: tuple[str, str, int]) -> Episode:
    """In a process of the pool, which keeps the scene of the task at hand: making one takes a second."""
    name, task, seed = job
    if task not in _scenes:
        for scene in _scenes.values():
            scene.close()
        _scenes.clear()
        _scenes[task] = Scene(task)
    policy, execution = _policies[name]
    return run_episode(_scenes[task], policy, seed, execution=execution)

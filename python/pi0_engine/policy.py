"""``Pi0Policy``: a robot's observation in, a chunk of its actions out."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.inputs import ModelInputs
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.norm_stats import load_norm_stats
from pi0_engine.robots.normalization import NormStats
from pi0_engine.robots.observation import Observation as ReadObservation
from pi0_engine.robots.observation import ObservationError
from pi0_engine.robots.transforms import ObservationTransform
from pi0_engine.rtc.continuation import check_mode, continue_chunks
from pi0_engine.rtc.guidance import Continuation, check_guidable
from pi0_engine.rtc.schedule import Leftover, RtcConfig
from pi0_engine.text.files import find_tokenizer
from pi0_engine.text.tokenizer import load_tokenizer
from pi0_engine.torch_needed import torch_needed

if TYPE_CHECKING:
    from pi0_engine.checkpoints.checkpoint import Checkpoint

Observation = Mapping[str, Any]

#: Guided, with lerobot's numbers.
DEFAULT_RTC = RtcConfig()


class Inferred(Protocol):
    """What an engine answers: actions float32 [B, samples, H, action_dim], normalised, and the seconds of each part."""

    @property
    def actions(self) -> Any: ...

    @property
    def seconds(self) -> dict[str, float]: ...


class ChunkEngine(Protocol):
    """What a policy asks of an engine: :class:`pi0_engine.engine.runtime.Engine`, or whatever else draws chunks."""

    config: Pi0Config
    engine_config: EngineConfig

    def infer(
        self,
        inputs: ModelInputs,
        noise: NDArray[np.float32],
        *,
        num_steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Inferred: ...

    def warm_up(
        self,
        *,
        views: int,
        samples: int = 1,
        horizon: int | None = None,
        per_token_time: bool = False,
        progress: bool = False,
    ) -> None: ...

    def describe(self) -> dict[str, Any]:
        """What decides what it computes and how it rounds, as JSON values; for recordings."""
        ...


class SubtaskPlanner:
    """Turns a high-level policy into instructions at its own, lower rate.

    Args:
        plan: observation -> instruction; for example a vision-language model that picks the next subtask.
        period_s: how long an instruction stays in force, in seconds.
    """

    def __init__(self, plan: Callable[[Observation], str], period_s: float = 1.0) -> None:
        if not period_s >= 0:
            raise ValueError(f"period_s is {period_s}, expected seconds, 0 or more")
        self._plan, self._period_s = plan, period_s
        self.reset()

    def reset(self) -> None:
        """Ask anew at the next observation."""
        self._instruction: str | None = None
        self._asked_at = 0.0

    def instruction(self, observation: Observation) -> str:
        """The instruction in force; asks ``plan`` when the last answer is older than the period."""
        now = time.monotonic()
        if self._instruction is None or now - self._asked_at >= self._period_s:
            self._instruction, self._asked_at = self._plan(observation), now
        return self._instruction


class Pi0Policy:
    """A checkpoint on an engine, behind one robot's observations and actions.

    Most users build it with :meth:`from_checkpoint`.

    Args:
        engine: runs the network.
        transform: between the robot and the network; its config gives the action horizon.
        subtask: gives the instruction wherever a call has no ``prompt``; it goes before the observation's own.
        seed: of the noise that starts each chunk; None draws one from the operating system.
        rtc: how a chunk continues the one in execution, where a call gives a leftover (docs/rtc.md).

    Raises:
        ValueError: an ``rtc`` mode that the model does not have.
    """

    def __init__(
        self,
        engine: ChunkEngine,
        transform: ObservationTransform,
        *,
        subtask: SubtaskPlanner | None = None,
        seed: int | None = None,
        rtc: RtcConfig = DEFAULT_RTC,
    ) -> None:
        check_mode(rtc, engine.config)
        self.engine, self.transform, self.subtask, self.rtc = engine, transform, subtask, rtc
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Checkpoint,
        *,
        robot: str | Path | Robot,
        config: Pi0Config | None = None,
        revision: str | None = None,
        engine: EngineConfig | None = None,
        tokenizer: str | Path | None = None,
        norm_stats: str | Path | NormStats | None = None,
        asset_id: str | None = None,
        subtask: SubtaskPlanner | None = None,
        seed: int | None = None,
        rtc: RtcConfig = DEFAULT_RTC,
        progress: bool = False,
    ) -> Pi0Policy:
        """Load everything a robot needs.

        Args:
            source: checkpoint directory or file, a Hugging Face Hub id (docs/checkpoints.md), or an opened checkpoint.
            robot: ``"aloha"``, ``"droid"``, ``"libero"``, ..., or a declaration file (docs/robots.md).
            config: the model, where the checkpoint does not say or says wrong.
            revision: of a Hub id.
            engine: device, dtype and backend.
            tokenizer: sentencepiece ``.model`` or ``tokenizer.json``; None looks beside the checkpoint and in caches.
            norm_stats: statistics, or where to find them; None looks in the checkpoint.
            asset_id: which of the checkpoint's statistics, where it has several.
            subtask, seed, rtc: as of :class:`Pi0Policy`.
            progress: show a bar while loading.

        Raises:
            ValueError: anything missing, unexpected or inconsistent, named.
        """
        with torch_needed("Pi0Policy.from_checkpoint"):
            from pi0_engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
            from pi0_engine.engine.runtime import Engine

        if isinstance(source, Checkpoint):
            checkpoint = source
        else:
            checkpoint = open_checkpoint(source, config=config, revision=revision)
        transform = load_transform(
            checkpoint, robot, config=config, tokenizer=tokenizer, norm_stats=norm_stats, asset_id=asset_id
        )
        return cls(Engine(checkpoint, engine, progress=progress), transform, subtask=subtask, seed=seed, rtc=rtc)

    @property
    def config(self) -> Pi0Config:
        return self.transform.config

    @property
    def robot(self) -> Robot:
        return self.transform.robot

    @property
    def no_rtc(self) -> str | None:
        """Why no chunk can continue another with this policy; None where they can."""
        if self.rtc.mode == "guided":
            try:
                check_guidable(self.engine.engine_config.solver)
            except ValueError as error:
                return str(error)
        return None

    def reset(self) -> None:
        """Begin a new episode: the subtask planner is asked anew."""
        if self.subtask is not None:
            self.subtask.reset()

    def warm_up(self, *, num_samples: int = 1, progress: bool = False) -> None:
        """Prepare for all cameras of the robot and any instruction, so that the first observation is as fast as others.

        On a GPU this compiles the kernels and captures the graphs: seconds, once. See :meth:`Engine.warm_up`.
        """
        views = sum(camera.slot is not None for camera in self.transform.robot.cameras)
        with self._lock:
            self.engine.warm_up(
                views=views,
                samples=num_samples,
                horizon=self.config.action_horizon,
                per_token_time=self.rtc.mode == "trained",
                progress=progress,
            )

    def infer(
        self,
        observation: Observation | ReadObservation | Sequence[Observation | ReadObservation],
        *,
        prompt: str | None = None,
        noise: ArrayLike | None = None,
        seed: int | None = None,
        num_samples: int = 1,
        num_steps: int | None = None,
        leftover: Leftover | Sequence[Leftover | None] | None = None,
    ) -> dict[str, Any]:
        """Answer an observation, or a list of B of them, with action chunks.

        Args:
            observation: as the robot's declaration says, or read by it already. Not modified.
            prompt: the instruction; it may change with every call, which costs a table look-up. None takes the
                subtask planner's, else the observation's, else the robot's default.
            noise: where each chunk starts, float [H, action_dim] (with several samples or observations
                [num_samples, H, action_dim] or [B, num_samples, H, action_dim]); its H sets the horizon.
            seed: draws the noise reproducibly, in place of ``noise``.
            num_samples: candidate chunks per observation; they share its prefix, so further ones are cheap.
            num_steps: flow steps; None takes the checkpoint's (10).
            leftover: what is left of the chunk in execution, which the new one then continues (all of its samples do):
                element k of the actions is for the same control step as ``leftover.actions[k]``. Actions beyond the
                horizon are not used. For a list of observations a list, with None where there is nothing to continue.

        Returns:
            ``actions``: float32 [H, A] in robot units, with a leading axis of samples if ``num_samples`` > 1, and
            before it one of observations if a list was given. ``state``: float32 [S] (or [B, S]), as the robot sent
            it. ``policy_timing``: milliseconds, ``infer_ms`` in all and each stage. ``rtc``: what was made of the
            leftover, ``{"used": bool, "delay": int, "leftover": int}``: how many of its actions count as executed by
            then, and how many were used at all (for a list of observations a list).

        Raises:
            ObservationError: an observation or prompt that cannot be used, named.
            ValueError: noise or a leftover that cannot be used, named; a leftover in guided mode where the engine's
                solver is not Euler's.
        """
        started = time.perf_counter()
        single = not isinstance(observation, Sequence)
        if prompt is None and self.subtask is not None:
            if not isinstance(observation, Mapping):
                raise ValueError(
                    "a subtask planner serves one robot, by its observation as a dict: give prompt= instead"
                )
            prompt = self.subtask.instruction(observation)
        try:
            inputs, context = self.transform.prepare(observation, prompt=prompt)
        except ValueError as error:
            raise ObservationError(str(error)) from error
        start = self._noise(noise, seed, inputs.batch, num_samples)
        leftovers = _per_observation(leftover, inputs.batch, single=single)
        continuation, used = continue_chunks(leftovers, self.rtc, self.transform, context, start.shape[2])
        prepared = time.perf_counter()
        with self._lock:  # the engine's buffers serve one inference at a time
            result = self.engine.infer(inputs, start, num_steps=num_steps, continuation=continuation)
        computed = time.perf_counter()
        actions = self.transform.finish(result.actions, context)
        if num_samples == 1:
            actions = actions[:, 0]
        state = context.robot_state.astype(np.float32)
        timing = {f"{stage}_ms": 1e3 * seconds for stage, seconds in result.seconds.items()}
        timing["prepare_ms"] = 1e3 * (prepared - started)
        timing["finish_ms"] = 1e3 * (time.perf_counter() - computed)
        timing["infer_ms"] = 1e3 * (time.perf_counter() - started)
        return {
            "actions": actions[0] if single else actions,
            "state": state[0] if single else state,
            "policy_timing": timing,
            "rtc": used[0] if single else used,
        }

    def _noise(self, noise: ArrayLike | None, seed: int | None, batch: int, num_samples: int) -> NDArray[np.float32]:
        """float32 [B, samples, H, action_dim], given or drawn."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        width = self.config.action_dim
        if noise is None:
            rng = self._rng if seed is None else np.random.default_rng(seed)
            return rng.standard_normal((batch, num_samples, self.config.action_horizon, width), dtype=np.float32)
        if seed is not None:
            raise ValueError("both noise and seed are given, expected at most one")
        given: NDArray[np.float32] = np.array(noise, dtype=np.float32)
        shaped = given.reshape((1,) * (4 - given.ndim) + given.shape) if given.ndim < 4 else given
        if shaped.ndim != 4 or shaped.shape[:2] != (batch, num_samples) or shaped.shape[3] != width:
            raise ValueError(
                f"noise has shape {list(given.shape)}, expected [{batch}, {num_samples}, horizon, {width}] "
                "(leading axes of length 1 may be left out)"
            )
        return shaped


def _per_observation(
    leftover: Leftover | Sequence[Leftover | None] | None, batch: int, *, single: bool
) -> list[Leftover | None]:
    if leftover is None:
        return [None] * batch
    if single != isinstance(leftover, Leftover):
        expected = "a Leftover for one observation" if single else f"a list of {batch}, one for each observation"
        raise ValueError(f"leftover is a {type(leftover).__name__}, expected {expected}")
    given: list[Leftover | None] = [leftover] if isinstance(leftover, Leftover) else list(leftover)
    if len(given) != batch or not all(item is None or isinstance(item, Leftover) for item in given):
        kinds = [type(item).__name__ for item in given]
        raise ValueError(f"leftover holds {kinds}, expected {batch} of Leftover or None, one for each observation")
    return given


def load_transform(
    checkpoint: Checkpoint,
    robot: str | Path | Robot,
    *,
    config: Pi0Config | None = None,
    tokenizer: str | Path | None = None,
    norm_stats: str | Path | NormStats | None = None,
    asset_id: str | None = None,
) -> ObservationTransform:
    """What stands between a robot and a checkpoint's network; arguments as of :meth:`Pi0Policy.from_checkpoint`.

    Raises:
        ValueError: anything missing or inconsistent, named.
    """
    declared = get_robot(robot)
    model = checkpoint.config if config is not None else _configured(checkpoint, declared)
    if not isinstance(norm_stats, NormStats):
        norm_stats = load_norm_stats(norm_stats or checkpoint.path, model, asset_id=asset_id)
    return ObservationTransform(
        robot=declared,
        stats=norm_stats,
        tokenizer=load_tokenizer(tokenizer or find_tokenizer(checkpoint.path), model),
        config=model,
    )


def _configured(checkpoint: Checkpoint, robot: Robot) -> Pi0Config:
    """The checkpoint's config, with what its files leave out taken from the robot's released checkpoints.

    openpi's files say nothing about the prompt format, and only its PyTorch ones (config.json) the action horizon;
    lerobot's say both.
    """
    if checkpoint.format == "lerobot":
        return checkpoint.config
    configured = robot.configure(checkpoint.config)
    if (checkpoint.path / "config.json").is_file():
        return dataclasses.replace(configured, action_horizon=checkpoint.config.action_horizon)
    return configured

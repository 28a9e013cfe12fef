"""Observations to network inputs, and the network's actions back to robot units.

In:  instruction -> robot maps -> normalise -> tokenise -> zero-pad the state; the frames are resized by the engine.
Out: un-normalise -> drop the padding -> add the state to relative actions -> robot maps.
The order is that of openpi's transforms (``policies/policy_config.py``, ``training/config.py``).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.inputs import ModelInputs, NotFiniteError
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.normalization import NormStats
from pi0_engine.robots.observation import Observation, read_observation, read_prompt
from pi0_engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Context:
    """What :meth:`ObservationTransform.finish` needs of the observations the actions answer.

    Attributes:
        robot_state: float64 [B, state_dim], as the robots sent it.
        state: float64 [B, state_dim], in model units, not normalised: what relative actions are relative to.
        prompts: the B instructions in force.
    """

    robot_state: NDArray[np.float64]
    state: FloatArray
    prompts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ObservationTransform:
    """Between one kind of robot and one checkpoint.

    Args:
        robot: its declaration.
        stats: the checkpoint's normalisation.
        tokenizer: made for ``config``.
        config: the model.
        pad_prompt_state: whether π0.5's prompt holds the state padded to ``action_dim``. openpi and lerobot from 0.5
            put the real dimensions there; lerobot 0.4 trained with the padded ones, and its files do not say so.

    Raises:
        ValueError: parts that do not fit each other, among them a delta mask other than the checkpoint's.
    """

    robot: Robot
    stats: NormStats
    tokenizer: Tokenizer
    config: Pi0Config
    pad_prompt_state: bool = False

    def __post_init__(self) -> None:
        robot, config = self.robot, self.config
        for name, dims in (("state", robot.state_dim), ("actions", robot.action_dim)):
            given = f"robot {robot.name!r}: {name} with {dims} dimensions"
            if dims > config.action_dim:
                raise ValueError(f"{given}, but the model takes at most {config.action_dim}")
            normalizer = getattr(self.stats, name)
            if normalizer.mode != "identity" and normalizer.dims < dims:
                raise ValueError(f"{given}, but {self.stats.source} covers {normalizer.dims}: it is of another robot")
            if dims < normalizer.dims < config.action_dim:
                # Files padded to the model's width are usual; anything between is suspicious.
                logger.warning("%s, but %s covers %d: is it this robot's?", given, self.stats.source, normalizer.dims)
        if self.tokenizer.config != config:
            raise ValueError("the tokenizer was made for another config than the transform")
        if self.stats.delta_mask is not None:
            declared = np.flatnonzero(robot.delta_mask).tolist()
            trained = np.flatnonzero(self.stats.delta_mask).tolist()
            if declared != trained:
                raise ValueError(
                    f"robot {robot.name!r} takes actions {declared} as relative to the state, but {self.stats.source} "
                    f"says {trained}: correct 'delta' in the robot's declaration"
                )

    def prepare(
        self,
        observations: Mapping[str, Any] | Observation | Sequence[Mapping[str, Any] | Observation],
        prompt: str | bytes | None = None,
    ) -> tuple[ModelInputs, Context]:
        """One observation, or a batch of B.

        Args:
            observations: one dict, or a list of them (docs/robots.md says what they hold). Not modified. Either may
                have been read already, by :func:`pi0_engine.robots.observation.read_observation`.
            prompt: an instruction that takes precedence over those in the observations.

        Returns:
            Inputs with batch B (1 for a single dict), their frames as the cameras sent them, and the context that
            :meth:`finish` asks for.

        Raises:
            ValueError: see :func:`pi0_engine.robots.observation.read_observation`; a state that is finite, but not any
                more when it is normalised. In a batch the message says which observation.
        """
        if isinstance(observations, (Mapping, Observation)):
            read = [self._read(observations, prompt)]
        else:
            read = self._read_batch(observations, prompt)
        robot_state = np.stack([observation.state for observation in read])
        state = self.robot.state_to_model(robot_state)
        normalized = self._normalized(state)
        image_masks = np.array([[slot in observation.frames for slot in self.robot.slots] for observation in read])
        frames = tuple(tuple(o.frames[slot] for slot in self.robot.slots if slot in o.frames) for o in read)
        tokens, token_mask = self._tokens(read, normalized)
        inputs = ModelInputs(
            frames=frames,
            image_masks=image_masks,
            tokens=tokens,
            token_mask=token_mask,
            state=self._pad(normalized),
        )
        return inputs, Context(robot_state, state, tuple(observation.prompt for observation in read))

    def finish(self, actions: ArrayLike, context: Context) -> NDArray[np.float32]:
        """The network's actions in the robot's units.

        Args:
            actions: float [B, ..., H, action_dim] as the network gives them; axes between B and H, e.g. several
                candidate chunks, are kept.
            context: of the same B observations.

        Returns:
            float32 [B, ..., H, robot.action_dim].

        Raises:
            ValueError: another shape than the context's, or actions that are not finite.
        """
        values = np.asarray(actions)
        batch, width = context.state.shape[0], self.config.action_dim
        if values.ndim < 3 or values.shape[0] != batch or values.shape[-1] != width:
            raise ValueError(f"actions have shape {list(values.shape)}, expected [{batch}, ..., H, {width}]")
        if not np.isfinite(values).all():
            raise NotFiniteError("the network's actions contain NaN or infinity")
        model_units = self.stats.actions.unnormalize(values)[..., : self.robot.action_dim]
        return self.robot.actions_to_robot(model_units, _per_chunk(context.state, values.ndim)).astype(np.float32)

    def encode_actions(self, actions: ArrayLike, context: Context) -> NDArray[np.float32]:
        """Robot units to network units, the inverse of :meth:`finish`: for training and for continuing a chunk.

        Args:
            actions: float [B, ..., H, robot.action_dim].
            context: of the observations that the actions follow.

        Returns:
            float32 [B, ..., H, action_dim], normalised and zero-padded.
        """
        values = np.asarray(actions, dtype=np.float64)
        batch, width = context.state.shape[0], self.robot.action_dim
        if values.ndim < 3 or values.shape[0] != batch or values.shape[-1] != width:
            raise ValueError(f"actions have shape {list(values.shape)}, expected [{batch}, ..., H, {width}]")
        model_units = self.robot.actions_to_model(values, _per_chunk(context.state, values.ndim))
        return self._pad(self.stats.actions.normalize(model_units))

    def _normalized(self, state: FloatArray) -> FloatArray:
        with np.errstate(over="ignore", invalid="ignore"):
            normalized = self.stats.state.normalize(state)
            fits = np.isfinite(normalized.astype(np.float32))
        if not fits.all():
            index = int(np.argmin(fits.all(axis=0)))
            given = state[int(np.argmin(fits[:, index])), index]
            raise ValueError(f"the state holds {given} at index {index}, normalised that is beyond float32")
        return normalized

    def _read(self, given: Mapping[str, Any] | Observation, prompt: str | bytes | None) -> Observation:
        if isinstance(given, Observation):
            return given if prompt is None else dataclasses.replace(given, prompt=read_prompt(prompt))
        return read_observation(given, self.robot, prompt)

    def _read_batch(
        self, batch: Sequence[Mapping[str, Any] | Observation], prompt: str | bytes | None
    ) -> list[Observation]:
        if len(batch) == 0:
            raise ValueError("the batch of observations is empty, expected at least one")
        read = []
        for index, observation in enumerate(batch):
            try:
                read.append(self._read(observation, prompt))
            except ValueError as error:
                raise ValueError(f"observation {index}: {error}") from error
        return read

    def _tokens(self, read: list[Observation], state: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        in_prompt = self._pad(state) if self.pad_prompt_state else state
        encoded = [
            self.tokenizer.encode_prompt(observation.prompt, row)
            for observation, row in zip(read, in_prompt, strict=True)
        ]
        return np.stack([ids for ids, _ in encoded]), np.stack([mask for _, mask in encoded])

    def _pad(self, values: FloatArray) -> NDArray[np.float32]:
        out = np.zeros((*values.shape[:-1], self.config.action_dim), np.float32)
        out[..., : values.shape[-1]] = values
        return out


def _per_chunk(state: FloatArray, ndim: int) -> FloatArray:
    """State [B, D] -> [B, 1, ..., D], to go with actions of ``ndim`` axes [B, ..., H, A]."""
    return state.reshape(state.shape[0], *[1] * (ndim - 3), state.shape[1])

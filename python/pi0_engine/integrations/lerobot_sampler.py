"""What stands in for ``sample_actions`` of lerobot's π0 and π0.5: its arguments to our inputs, our actions back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0_engine.engine.runtime import Engine
from pi0_engine.inputs import ModelInputs
from pi0_engine.rtc.guidance import Guide
from pi0_engine.rtc.schedule import prefix_weights


class Sampler:
    """One engine behind lerobot's call. Threads take turns: the engine's buffers serve one inference at a time.

    Args:
        engine: our engine, with this model's weights.
        model: lerobot's ``PI0Pytorch`` or ``PI05Pytorch``; it draws the noise, and its config is read at every call,
            because lerobot's tools set ``rtc_config`` after loading.

    Attributes:
        watched: lerobot's own parameters, whose changes would not reach the engine; empty where they are released.
    """

    def __init__(self, engine: Engine, model: Any) -> None:
        self.engine = engine
        self.watched: list[Tensor] = []
        self._model = model
        self._lock = threading.Lock()
        self._version = 0

    def watch(self, parameters: list[Tensor]) -> None:
        """Refuse to act once any of these has been written to: the engine would not know."""
        self.watched = [p for p in parameters if not p.is_inference()]
        self._version = self._current_version()

    def as_function(self) -> Callable[..., Tensor]:
        """``__call__`` as torch.compile leaves it alone; the engine is compiled already. Its ``sampler`` is self."""
        function: Any = torch.compiler.disable(self.__call__)
        function.sampler = self
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def sample(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None,
        device: torch.device,
        noise: Tensor | None,
        num_steps: int | None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """float32 [B, chunk_size, max_action_dim] on ``device``, from the arguments of lerobot's ``sample_actions``.

        Args:
            images: per camera float32 [B, 3, S, S] in [-1, 1].
            img_masks: per camera bool [B].
            tokens, token_mask: [B, L], right-padded.
            state: [B, max_state_dim]; None for π0.5.
            device: where lerobot draws its noise.
            noise: [B, chunk_size, max_action_dim]; None draws it as lerobot does, from torch's generator.
            num_steps: flow steps; None takes the policy's.
            inference_delay, prev_chunk_left_over, execution_horizon: of :func:`guide_of`; read only if the policy's
                ``rtc_config`` is enabled, as in lerobot.

        Raises:
            ValueError: arguments that the model cannot take, or weights that changed since the engine was built.
        """
        if self._current_version() != self._version:
            raise ValueError("the policy's weights changed after accelerate(policy): call it again")
        config = self._model.config
        shape = (tokens.shape[0], config.chunk_size, config.max_action_dim)
        if noise is None:
            noise = self._model.sample_noise(shape, device)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise is {list(noise.shape)}, expected {list(shape)}")
        inputs = _inputs(images, img_masks, tokens, token_mask, state, config.max_action_dim)
        start = noise.detach().to("cpu", torch.float32)[:, None]
        steps = config.num_inference_steps if num_steps is None else num_steps
        guide = None
        if config.rtc_config is not None:
            _check_no_debugging(config.rtc_config)
            if config.rtc_config.enabled and prev_chunk_left_over is not None:
                guide = guide_of(config.rtc_config, shape, inference_delay, prev_chunk_left_over, execution_horizon)
        # lerobot may run under autocast, which would round what the engine keeps in float32.
        with self._lock, torch.autocast(self.engine.device.type, enabled=False):
            result = self.engine.infer(inputs, start, num_steps=steps, continuation=guide)
        return result.actions[:, 0].to(device)

    def _current_version(self) -> int:
        return sum(parameter._version for parameter in self.watched)


class Pi0Sampler(Sampler):
    """``PI0Pytorch.sample_actions``."""

    def __call__(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        **rtc: Any,
    ) -> Tensor:
        return self.sample(images, img_masks, lang_tokens, lang_masks, state, state.device, noise, num_steps, **rtc)


class Pi05Sampler(Sampler):
    """``PI05Pytorch.sample_actions``: the state is in the prompt."""

    def __call__(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        tokens: Tensor,
        masks: Tensor,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        **rtc: Any,
    ) -> Tensor:
        return self.sample(images, img_masks, tokens, masks, None, tokens.device, noise, num_steps, **rtc)


def guide_of(
    rtc_config: Any,
    shape: tuple[int, int, int],
    inference_delay: int | None,
    prev_chunk_left_over: Tensor,
    execution_horizon: int | None,
) -> Guide:
    """What lerobot's ``RTCProcessor.denoise_step`` makes of the same arguments.

    Args:
        rtc_config: lerobot's ``RTCConfig``.
        shape: [B, H, A] of the new chunk.
        inference_delay: steps of the leftover that will be executed before the new chunk is there.
        prev_chunk_left_over: normalised, [B, L, A'] or [L, A'], at most [B, H, A]; what it lacks is taken as zeros.
        execution_horizon: None takes ``rtc_config``'s. No longer than the leftover in any case.

    Raises:
        ValueError: a missing delay, or a leftover that does not fit.
    """
    batch, horizon, width = shape
    if inference_delay is None:
        raise ValueError("inference_delay is None, expected an integer beside prev_chunk_left_over")
    given = prev_chunk_left_over.detach().to("cpu", torch.float32)
    left = given[None] if given.ndim == 2 else given
    if left.ndim != 3 or left.shape[0] not in (1, batch) or left.shape[1] > horizon or left.shape[2] > width:
        raise ValueError(
            f"prev_chunk_left_over is {list(given.shape)}, expected at most [{batch}, {horizon}, {width}], "
            "the first axis may be left out"
        )
    previous = np.zeros(shape, np.float32)
    previous[:, : left.shape[1], : left.shape[2]] = left.numpy()
    end = rtc_config.execution_horizon if execution_horizon is None else execution_horizon
    schedule = rtc_config.prefix_attention_schedule.value.lower()
    weights = prefix_weights(schedule, inference_delay, min(end, left.shape[1]), horizon)
    return Guide(previous, np.tile(weights, (batch, 1)), float(rtc_config.max_guidance_weight))


def _check_no_debugging(rtc_config: Any) -> None:
    if rtc_config.debug:
        raise ValueError("rtc_config.debug is true: it records every flow step, which the engine cannot show")


def _inputs(
    images: Sequence[Tensor],
    img_masks: Sequence[Tensor],
    tokens: Tensor,
    token_mask: Tensor,
    state: Tensor | None,
    action_dim: int,
) -> ModelInputs:
    if state is None:
        state = torch.zeros(tokens.shape[0], action_dim)
    pixels = torch.stack([image.detach().to("cpu", torch.float32).permute(0, 2, 3, 1) for image in images], dim=1)
    return ModelInputs(
        images=pixels.contiguous().numpy(),
        image_masks=torch.stack([mask.to("cpu", torch.bool) for mask in img_masks], dim=1).numpy(),
        tokens=tokens.to("cpu", torch.int64).numpy(),
        token_mask=token_mask.to("cpu", torch.bool).numpy(),
        state=state.detach().to("cpu", torch.float32).numpy(),
    )

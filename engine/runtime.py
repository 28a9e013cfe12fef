"""``Engine``: weights, ops and buffers tied together. ``__init__`` is the boot sequence, ``infer`` one inference."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pi0_engine.config import EngineConfig
from pi0_engine.engine.pipeline import run
from pi0_engine.engine.plan import ShapePlan, Workspace
from pi0_engine.engine.time_terms import TimeTerms
from pi0_engine.engine.weights import TensorSource, pack_weights
from pi0_engine.inputs import ModelInputs
from pi0_engine.kernels.gemm import cpu_computes_bfloat16
from pi0_engine.kernels.registry import Ops, select_ops
from pi0_engine.kernels.stream import Scratch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """What one call computed.

    Attributes:
        actions: float32 [B, samples, H, action_dim] on the CPU, normalised; a copy that the caller owns.
        seconds: wall time of each stage, in order: inputs, then those of ``pipeline.STAGES``.
    """

    actions: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """Runs one checkpoint. Its buffers serve one inference at a time: callers in several threads take turns.

    Args:
        source: an opened checkpoint (``open_checkpoint``) or anything with ``config`` and ``tensor(name)``.
        config: device, dtype, backend.
        progress: show a bar while weights are packed.

    Raises:
        ValueError: a device or backend that is not available here, or a checkpoint tensor that cannot be read.
    """

    def __init__(self, source: TensorSource, config: EngineConfig | None = None, *, progress: bool = False) -> None:
        self.engine_config = config or EngineConfig()
        self.config = source.config
        self.device = resolve_device(self.engine_config.device)
        self.dtype, self.dtype_reason = resolve_dtype(self.engine_config.dtype, self.device)
        self.ops: Ops = select_ops(self.engine_config.backend, self.device)
        self.weights = pack_weights(source, self.dtype, self.device, progress=progress)
        self.time_terms = TimeTerms(source, self.weights.expert, self.device)
        self.time_terms(self.config.num_steps)
        self.scratch = Scratch.allocate(self.device, needed=self.ops.launcher is not None)
        self._workspaces: OrderedDict[ShapePlan, Workspace] = OrderedDict()

    def infer(self, inputs: ModelInputs, noise: Tensor, *, num_steps: int | None = None) -> Inference:
        """Draw action chunks.

        Args:
            inputs: a batch of B observations.
            noise: float32 [B, samples, H, action_dim], standard normal; its shape says how many candidate chunks to
                draw per observation and how long they are.
            num_steps: Euler steps; the checkpoint's own number where None.

        Raises:
            ValueError: inputs or noise that the model cannot take, or actions that are not finite.
        """
        inputs.validate(self.config)
        self._check_noise(inputs, noise)
        clock = _StageClock(self.device)
        plan = self._plan(inputs, noise, num_steps)
        with torch.inference_mode():
            space = self.workspace(plan)
            self._load(inputs, noise, space)
            steps = self.time_terms(plan.num_steps)  # here, so that a new step count is not timed as vision
            clock.lap("inputs")
            run(self.ops, self.config, self.weights, steps, space, clock.lap)
        # Copied out here: a tensor made in inference mode could not be changed by its owner.
        actions = torch.empty(noise.shape).copy_(space["actions"].view(noise.shape))
        if not bool(torch.isfinite(actions).all()):
            raise ValueError("the model computed NaN or infinity from finite inputs: are the weights finite?")
        return Inference(actions, clock.seconds)

    def workspace(self, plan: ShapePlan) -> Workspace:
        """The buffers of a plan; made at its first use, the least recently used set is freed for it."""
        if plan not in self._workspaces:
            while len(self._workspaces) >= self.engine_config.max_plans:
                self._workspaces.popitem(last=False)
            self._workspaces[plan] = Workspace(
                self.config, plan, self.dtype, self.device, self.scratch
            )
            log.debug("new plan %s: %.1f MB of buffers", plan, self._workspaces[plan].arena.numel() / 1e6)
        self._workspaces.move_to_end(plan)
        return self._workspaces[plan]

    def _plan(self, inputs: ModelInputs, noise: Tensor, num_steps: int | None) -> ShapePlan:
        return ShapePlan.of(
            self.config,
            views=inputs.image_masks.sum(dim=1).tolist(),
            prompt_lengths=inputs.token_mask.sum(dim=1).tolist(),
            samples=noise.shape[1],
            horizon=noise.shape[2],
            num_steps=num_steps,
            prompt_bucket=self.engine_config.prompt_bucket,
        )

    def _load(self, inputs: ModelInputs, noise: Tensor, space: Workspace) -> None:
        """Copy present cameras, prompt embeddings, state and noise into the buffers, without gaps."""
        space["patches"].copy_(cut_patches(inputs.images[inputs.image_masks], self.config.vision.patch_size))
        space["actions"].copy_(noise.flatten(0, 2))
        if space.plan.state_rows:
            space["state"].copy_(inputs.state)
        prompt_rows = inputs.token_mask.sum(dim=1)
        space.set_lengths(torch.tensor(space.plan.image_rows) + prompt_rows)
        for row, tokens, count in zip(space["prompt"], inputs.tokens, prompt_rows.tolist(), strict=True):
            row[:count].copy_(self._embed(tokens[:count]))

    def _embed(self, tokens: Tensor) -> Tensor:
        """Rows of the memory-mapped table times sqrt(width), as Gemma scales text (and only text) embeddings."""
        return self.weights.embed_tokens[tokens].float() * math.sqrt(self.config.llm.width)

    def _check_noise(self, inputs: ModelInputs, noise: Tensor) -> None:
        expected = f"float32 [{inputs.batch}, samples, horizon, {self.config.action_dim}]"
        fits = noise.ndim == 4 and noise.shape[0] == inputs.batch and noise.shape[3] == self.config.action_dim
        if not fits or noise.dtype != torch.float32 or noise.numel() == 0:
            raise ValueError(f"noise is {noise.dtype} {list(noise.shape)}, expected {expected}")
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("noise contains NaN or infinity")


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """images [N, S, S, 3] -> [N * (S / patch)^2, patch * patch * 3], patches row-major, pixels too, channel fastest."""
    count, size, _, channels = images.shape
    grid = size // patch
    tiles = images.reshape(count, grid, patch, grid, patch, channels).transpose(2, 3)
    return tiles.reshape(count * grid * grid, patch * patch * channels)


class _StageClock:
    """Wall time between laps; waits for the GPU at each, so that a lap is the stage's own time."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def resolve_device(name: str) -> torch.device:
    """The torch device of that name, or ValueError with the reason why it cannot be used."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one torch knows: {error}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device is {name!r}, expected 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} sees no CUDA GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA GPU(s), numbered from 0")
    return device


def resolve_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and activations, and why."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name], "asked for by name"
    if device.type == "cuda":
        return torch.bfloat16, "the GPU's tensor cores take bfloat16"
    if cpu_computes_bfloat16():
        return torch.bfloat16, "this processor has bfloat16 instructions"
    return torch.float32, "this processor has no bfloat16 instructions"

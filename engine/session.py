"""One plan at work: its buffers, the host memory that they are filled from, and the graphs captured on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pi0_engine.config import Pi0Config
from pi0_engine.engine.arrays import as_tensor
from pi0_engine.engine.graph import CapturedGraph
from pi0_engine.engine.plan import ShapePlan, Workspace
from pi0_engine.images.pack import FrameStaging
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.inputs import ModelInputs
from pi0_engine.kernels.stream import Scratch
from pi0_engine.rtc.guidance import Continuation, FixedPrefix, Guide

#: What an observation fills, and what the start of a chunk does: noise goes into "actions".
_OBSERVATION = ("prompt", "state", "lengths", "suffix_positions")
_START = ("actions", "previous", "prefix_weights", "max_weight", "time_index")


class Session:
    """The memory of one :class:`ShapePlan`, for one inference at a time.

    Inputs are written to host memory that the GPU can read by itself (pinned), and uploaded together; on a CPU they are
    written where they are used.

    Args:
        resize: makes patches of frames, unless the plan says that the GPU does.

    Attributes:
        space: the plan's buffers.
        graphs: captured graphs by what they run and the number of flow steps.
    """

    def __init__(
        self,
        config: Pi0Config,
        plan: ShapePlan,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
        resize: FramePreprocessor,
    ) -> None:
        self.plan, self._config, self._resize = plan, config, resize
        self.space = Workspace(config, plan, dtype, device, scratch)
        # Lengths that a capture may run with before the first inference.
        self.space.set_lengths(torch.full((plan.batch,), plan.prefix))
        self.graphs: dict[tuple[str, int], CapturedGraph] = {}
        cameras = ("pixels", "table") if plan.frames else ("patches",)
        self._device_inputs = {name: self._on_device(name) for name in (*cameras, *_OBSERVATION, *_START)}
        self._staged = {name: _host_twin(tensor) for name, tensor in self._device_inputs.items()}
        if plan.frames:
            pixels, table = (self._staged[name].numpy() for name in cameras)
            self._frames = FrameStaging(pixels, table, config.vision.image_size)
        self._result = _host_twin(self.space["actions"])
        self._embedded: list[list[int] | None] = [None] * plan.batch

    def _on_device(self, name: str) -> Tensor:
        return getattr(self.space, name) if name in ("lengths", "suffix_positions") else self.space[name]

    def load_observation(self, inputs: ModelInputs, embed: Callable[[Tensor], Tensor]) -> None:
        """Present cameras, prompt embeddings, state and lengths, without gaps. ``embed`` maps token ids to rows.

        A prompt is embedded only when it changes.
        """
        self._load_cameras(inputs)
        staged = self._staged
        if self.plan.state_rows:
            staged["state"].copy_(as_tensor(inputs.state))
        prompt_rows = as_tensor(inputs.token_mask).sum(dim=1)
        given = as_tensor(inputs.tokens)
        lengths = torch.tensor(self.plan.image_rows) + prompt_rows
        staged["lengths"].copy_(lengths)
        staged["suffix_positions"].copy_(self.space.suffix_positions_after(lengths))
        # Pinned memory keeps the embedded rows; on a CPU later stages reuse the buffer.
        kept = staged["prompt"] is not self._device_inputs["prompt"]
        for b, count in enumerate(prompt_rows.tolist()):
            tokens = given[b, :count]
            if not kept or self._embedded[b] != tokens.tolist():
                staged["prompt"][b, :count].copy_(embed(tokens))
                self._embedded[b] = tokens.tolist()
        self._upload(*_OBSERVATION)

    def _load_cameras(self, inputs: ModelInputs) -> None:
        if self.plan.images == 0:
            return
        frames = [frame for row in inputs.frames or () for frame in row]
        if self.plan.frames:
            used = self._frames.pack(frames)
            self._upload("pixels", first=used.bytes)
            self._upload("table", first=used.ints)
            return
        patch, every = self._config.vision.patch_size, self._staged["patches"].unflatten(0, (-1, self.plan.patches))
        if frames:
            self._resize.patches(frames, patch, every.numpy())
        else:
            images, present = as_tensor(inputs.pixels), np.argwhere(inputs.image_masks).tolist()
            for (b, slot), patches in zip(present, every, strict=True):
                cut_patches(images[b, slot], patch, out=patches)
        self._upload("patches")

    def load_noise(self, noise: Tensor, continuation: Continuation | None = None) -> None:
        """float32 [B, samples, H, action_dim], and the chunk that all samples of an observation continue, if any."""
        staged, chunks = {name: self._staged[name] for name in _START}, noise.shape[:3]
        staged["actions"].copy_(noise.flatten(0, 2))
        for name in _START[1:]:
            staged[name].zero_()
        if isinstance(continuation, Guide):
            previous, weights = as_tensor(continuation.previous), as_tensor(continuation.weights)
            staged["previous"].view(noise.shape).copy_(previous[:, None].expand(noise.shape))
            staged["prefix_weights"].view(chunks).copy_(weights[:, None].expand(chunks))
            staged["max_weight"].fill_(continuation.max_weight)
        elif isinstance(continuation, FixedPrefix):
            given = as_tensor(continuation.given())[:, None].expand(chunks)
            previous = as_tensor(continuation.previous)[:, None].expand(noise.shape)
            staged["actions"].copy_(torch.where(given[..., None], previous, noise).flatten(0, 2))
            staged["time_index"].copy_(given.flatten())
        self._upload(*_START)

    def actions(self) -> Tensor:
        """float32 [B, samples, H, action_dim] on the CPU: a copy. Waits for the GPU."""
        computed = self.space["actions"]
        if self._result is not computed:
            self._result.copy_(computed, non_blocking=True)
            torch.cuda.current_stream(computed.device).synchronize()
        plan = self.plan
        out = torch.empty(plan.batch, plan.samples, plan.horizon, self._config.action_dim)
        return out.copy_(self._result.view(out.shape))

    def _upload(self, *names: str, first: int | None = None) -> None:
        """``first`` says how many elements are in use, where not all are."""
        for name in names:
            device, staged = self._device_inputs[name], self._staged[name]
            if staged is not device:
                device[:first].copy_(staged[:first], non_blocking=True)


def _host_twin(tensor: Tensor) -> Tensor:
    """Pinned host memory of the same shape; on a CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def cut_patches(image: Tensor, patch: int, *, out: Tensor) -> None:
    """image [S, S, 3] -> out [(S / patch)^2, patch * patch * 3].

    Patches row-major in the image, pixels row-major in the patch, channel fastest.
    """
    grid = image.shape[0] // patch
    tiles = image.reshape(grid, patch, grid, patch, 3).transpose(1, 2)
    out.view(tiles.shape).copy_(tiles)

"""All lengths and all memory of one inference, decided before it runs.

:class:`ShapePlan` holds the lengths; :func:`plan_buffers` turns them into named buffers with a lifetime, and lays
buffers that are never alive together over the same bytes; :class:`Workspace` allocates them once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config

#: The stages in the order in which they run; a buffer lives from one of them to another, both included.
VISION, PREFIX, STATE, FLOW = range(4)
#: Buffers start on this boundary: a cache line on CPUs, and what a GPU's 16-byte loads and TMA (128) ask for.
ALIGNMENT = 256


@dataclass(frozen=True)
class ShapePlan:
    """Every length of one inference.

    Attributes:
        views: present cameras of each observation; absent ones are dropped, not masked.
        prefix: rows reserved for each observation's prefix (images, then prompt).
        exact: whether every observation fills its rows, so that no length has to be checked.
        samples: candidate chunks per observation; they share its prefix.
        horizon: actions per chunk.
        num_steps: Euler steps. No buffer depends on it, so plans that differ in it alone are equal.
    """

    views: tuple[int, ...]
    prefix: int
    exact: bool
    samples: int
    horizon: int
    num_steps: int = field(compare=False)

    @classmethod
    def of(
        cls,
        config: Pi0Config,
        *,
        views: Sequence[int],
        prompt_lengths: Sequence[int],
        samples: int = 1,
        horizon: int | None = None,
        num_steps: int | None = None,
        prompt_bucket: int = 1,
    ) -> ShapePlan:
        """Lengths for observations with these camera and prompt token counts (one entry each).

        Raises:
            ValueError: a count that is not positive where it must be.
        """
        horizon = config.action_horizon if horizon is None else horizon
        num_steps = config.num_steps if num_steps is None else num_steps
        for name, value in (("num_samples", samples), ("action horizon", horizon), ("num_steps", num_steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        image_rows = [v * config.vision.num_patches for v in views]
        lengths = [rows + prompt for rows, prompt in zip(image_rows, prompt_lengths, strict=True)]
        prefix = max(
            rows + math.ceil(prompt / prompt_bucket) * prompt_bucket
            for rows, prompt in zip(image_rows, prompt_lengths, strict=True)
        )
        exact = all(length == prefix for length in lengths)
        return cls(tuple(views), prefix, exact, samples, horizon, num_steps)

    @property
    def batch(self) -> int:
        return len(self.views)

    @property
    def images(self) -> int:
        return sum(self.views)

    @property
    def chunks(self) -> int:
        """Action chunks computed: one per observation and sample."""
        return self.batch * self.samples


@dataclass(frozen=True)
class Buffer:
    """One named array: shape, dtype, and the first and last stage that use it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def state_rows(config: Pi0Config) -> int:
    """Cache rows in front of the prefix for the state token: 1 in π0, none in π0.5 (whose prompt holds the state)."""
    return 0 if config.is_pi05 else 1


def plan_buffers(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype) -> list[Buffer]:
    """Every buffer of one inference; ``dtype`` is that of weights and activations.

    The state token's keys and values take row 0 of the cache, in front of the prefix: a row that does not move when
    the prompt grows. Order is free, because RoPE has put the position into the key.
    """
    f32, vision, llm, expert = torch.float32, config.vision, config.llm, config.expert
    patches, kv, rows = vision.num_patches, llm.kv_dim, state_rows(config) + plan.prefix
    batch, chunks, horizon = plan.batch, plan.chunks, plan.horizon
    buffers = [
        Buffer("images", (plan.images, vision.image_size, vision.image_size, 3), f32, VISION, VISION),
        Buffer("vision_x", (plan.images, patches, vision.width), f32, VISION, VISION),
        Buffer("vision_qkv", (plan.images, patches, 3 * vision.width), dtype, VISION, VISION),
        Buffer("vision_mixed", (plan.images, patches, vision.width), dtype, VISION, VISION),
        Buffer("vision_hidden", (plan.images, patches, vision.mlp_dim), dtype, VISION, VISION),
        Buffer("prefix_x", (batch, plan.prefix, llm.width), f32, VISION, PREFIX),
        Buffer("prefix_q", (batch, plan.prefix, llm.q_dim), dtype, PREFIX, PREFIX),
        Buffer("prefix_mixed", (batch, plan.prefix, llm.q_dim), dtype, PREFIX, PREFIX),
        Buffer("prefix_hidden", (batch, plan.prefix, llm.mlp_dim), dtype, PREFIX, PREFIX),
        Buffer("cache_k", (llm.depth, batch, rows, kv), dtype, PREFIX, FLOW),
        Buffer("cache_v", (llm.depth, batch, rows, kv), dtype, PREFIX, FLOW),
        Buffer("actions", (chunks, horizon, config.action_dim), f32, VISION, FLOW),
        Buffer("action_hidden", (chunks, horizon, expert.width), f32, FLOW, FLOW),
        Buffer("suffix_x", (chunks, horizon, expert.width), f32, FLOW, FLOW),
        Buffer("suffix_q", (chunks, horizon, expert.q_dim), dtype, FLOW, FLOW),
        Buffer("suffix_k", (chunks, horizon, kv), dtype, FLOW, FLOW),
        Buffer("suffix_v", (chunks, horizon, kv), dtype, FLOW, FLOW),
        Buffer("suffix_mixed", (chunks, horizon, expert.q_dim), dtype, FLOW, FLOW),
        Buffer("suffix_hidden", (chunks, horizon, expert.mlp_dim), dtype, FLOW, FLOW),
    ]
    if state_rows(config):
        buffers += [
            Buffer("state", (batch, 1, config.action_dim), f32, VISION, STATE),
            Buffer("state_x", (batch, 1, expert.width), f32, STATE, STATE),
            Buffer("state_q", (batch, 1, expert.q_dim), dtype, STATE, STATE),
            Buffer("state_mixed", (batch, 1, expert.q_dim), dtype, STATE, STATE),
            Buffer("state_hidden", (batch, 1, expert.mlp_dim), dtype, STATE, STATE),
        ]
    return buffers


def place_buffers(buffers: Sequence[Buffer]) -> tuple[dict[str, int], int]:
    """Byte offset of each buffer in one arena, and the arena's size.

    Largest first, each at the lowest offset where it overlaps no buffer that is alive at the same time.
    """
    placed: list[tuple[Buffer, int]] = []
    for buffer in sorted(buffers, key=lambda b: -b.nbytes):
        offset = 0
        rivals = [(other, at) for other, at in placed if other.first <= buffer.last and buffer.first <= other.last]
        for other, at in sorted(rivals, key=lambda pair: pair[1]):
            if offset + buffer.nbytes <= at:
                break
            offset = max(offset, _align(at + other.nbytes))
        placed.append((buffer, offset))
    return {b.name: at for b, at in placed}, max((at + b.nbytes for b, at in placed), default=0)


class Workspace:
    """The buffers of one plan as tensors, plus what depends on the plan alone.

    Attributes:
        lengths, cache_lengths: int64 [B] valid prefix rows, without and with the state row.
        prefix_positions [B, P], state_positions [B, 1], suffix_positions [B * samples, H]: int64 RoPE positions.
        rope_table: float32 [positions, head_dim], cosines then sines.
    """

    def __init__(self, config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, device: torch.device) -> None:
        buffers = plan_buffers(config, plan, dtype)
        offsets, size = place_buffers(buffers)
        self.plan = plan
        self.arena = torch.zeros(size, dtype=torch.uint8, device=device)
        self._tensors = {
            b.name: self.arena[offsets[b.name] : offsets[b.name] + b.nbytes].view(b.dtype).view(b.shape)
            for b in buffers
        }
        self.state_rows = state_rows(config)
        self.lengths = torch.zeros(plan.batch, dtype=torch.int64, device=device)
        self.cache_lengths = torch.zeros_like(self.lengths)
        self.prefix_positions = torch.arange(plan.prefix, device=device).expand(plan.batch, -1)
        self.state_positions = torch.zeros(plan.batch, 1, dtype=torch.int64, device=device)
        self.suffix_positions = torch.zeros(plan.chunks, plan.horizon, dtype=torch.int64, device=device)
        positions = plan.prefix + self.state_rows + plan.horizon
        self.rope_table = rope_table(positions, config.llm.head_dim).to(device)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def set_lengths(self, lengths: Tensor) -> None:
        """Take int64 [B] valid prefix rows; every position behind the prefix follows from them."""
        self.lengths.copy_(lengths)
        self.cache_lengths.copy_(self.lengths + self.state_rows)
        self.state_positions.copy_(self.lengths[:, None])
        starts = self.cache_lengths.repeat_interleave(self.plan.samples)
        steps = torch.arange(self.plan.horizon, device=starts.device)
        self.suffix_positions.copy_(starts[:, None] + steps)

    def masked(self, lengths: Tensor) -> Tensor | None:
        """``lengths`` for an attention op, or None where the plan says that every row is valid."""
        return None if self.plan.exact else lengths


def rope_table(positions: int, head_dim: int) -> Tensor:
    """float32 [positions, head_dim]: cosines of position / 10000^(2i / head_dim), then sines.

    The angle is rounded to float32 as openpi's is; its cosine and sine are then exact to float32.
    """
    inv_freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq).double()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT

"""All lengths and all memory of one inference, decided before it runs.

:class:`ShapePlan` holds the lengths; :func:`plan_buffers` turns them into named buffers with a lifetime, and lays
buffers that are never alive together over the same bytes; :class:`Workspace` allocates them once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pi0_engine.config import Pi0Config, SolverName
from pi0_engine.kernels.stream import Scratch, Stream, sum_blocks
from pi0_engine.rtc.guidance import check_per_token_time

#: The stages in the order in which they run; a buffer lives from one of them to another, both included.
VISION, PREFIX, FLOW = range(3)
#: Kernels index with 32-bit integers.
_MOST_ELEMENTS = 1 << 31
#: Buffers start on this boundary: a cache line on CPUs, and what a GPU's 16-byte loads and TMA (128) ask for.
ALIGNMENT = 256


#: Tokens to which prompts are rounded up where every plan is a captured graph: 3 graphs serve all prompts of π0, and a
#: dozen more rows cost nothing inside a tile of 64.
GPU_PROMPT_BUCKET = 16
#: Least bytes and table entries for frames: three cameras of 640 x 480 fit into 4 MiB and 32768 entries.
_FRAME_BUCKET = (4 << 20, 1 << 15)


@dataclass(frozen=True)
class ShapePlan:
    """Every length of one inference.

    Attributes:
        views: present cameras of each observation; absent ones are dropped, not masked.
        prefix: rows reserved for each observation's prefix (images, then prompt).
        exact: whether every observation fills its rows, so that no length has to be checked. Never so where prompts
            share a bucket: the plan, and a graph captured for it, must not depend on the instruction.
        samples: candidate chunks per observation; they share its prefix.
        horizon: actions per chunk.
        num_steps: flow steps. No buffer depends on it, so plans that differ in it alone are equal.
        patches: image tokens of each view.
        frames: (bytes, table entries) reserved for frames that a GPU resizes; None where it is given pixels.
        state_rows: state tokens, one per observation in π0, none in π0.5 (whose prompt holds the state).
        per_token_time: whether each action token has a flow time of its own, the step's or 0 (rtc/guidance.py).
        solver: of the flow; those of second order have a buffer more (solvers.py).
    """

    views: tuple[int, ...]
    prefix: int
    exact: bool
    samples: int
    horizon: int
    num_steps: int = field(compare=False)
    patches: int
    state_rows: int
    frames: tuple[int, int] | None = None
    per_token_time: bool = False
    solver: SolverName = "euler"

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
        frames: tuple[int, int] | None = None,
        per_token_time: bool = False,
        solver: SolverName = "euler",
    ) -> ShapePlan:
        """Lengths for observations with these camera and prompt token counts (one entry each).

        Raises:
            ValueError: a count that is not positive where it must be, or a time per token of a model that has none.
        """
        if per_token_time:
            check_per_token_time(config)
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
        exact = prompt_bucket == 1 and all(length == prefix for length in lengths)
        state_rows = 0 if config.is_pi05 else len(views)
        patches, frames = config.vision.num_patches, frame_bucket(frames) if frames and any(views) else None
        return cls(
            tuple(views),
            prefix,
            exact,
            samples,
            horizon,
            num_steps,
            patches,
            state_rows,
            frames,
            per_token_time,
            solver,
        )

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

    @property
    def image_rows(self) -> tuple[int, ...]:
        """Image tokens at the head of each observation's prefix."""
        return tuple(views * self.patches for views in self.views)

    @property
    def prompt_rows(self) -> int:
        """Rows behind the images, of the observation that has most."""
        return self.prefix - min(self.image_rows)

    @property
    def action_rows(self) -> int:
        """Action tokens of all chunks, the first rows of the suffix."""
        return self.chunks * self.horizon

    @property
    def suffix_rows(self) -> int:
        """Action tokens, then state tokens."""
        return self.action_rows + self.state_rows


def frame_bucket(needed: tuple[int, int]) -> tuple[int, int]:
    """Powers of two, of bytes and of table entries: cameras that fit into the least share a plan, and so on."""
    (pixels, table), (least_pixels, least_table) = needed, _FRAME_BUCKET
    return max(1 << (pixels - 1).bit_length(), least_pixels), max(1 << (table - 1).bit_length(), least_table)


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


def plan_buffers(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype) -> list[Buffer]:
    """Every buffer of one inference; ``dtype`` is that of weights and activations.

    Rows of all images, all observations or all chunks are stacked: a linear layer sees one matrix. The suffix has the
    action tokens first and the state tokens behind them, so that the rows of every flow step are contiguous.
    """
    f32, vision, llm, expert = torch.float32, config.vision, config.llm, config.expert
    image_tokens, tokens = plan.images * vision.num_patches, plan.batch * plan.prefix
    actions, suffix = plan.action_rows, plan.suffix_rows
    frame_bytes, table_entries = plan.frames or (0, 0)
    based = 0 if plan.solver == "euler" else actions
    return [
        # To the end, though nobody reads them after vision: a capture runs the kernel that follows the table's offsets,
        # and must find the last valid one (or zeros) there, not another buffer's contents.
        Buffer("pixels", (frame_bytes,), torch.uint8, VISION, FLOW),
        Buffer("table", (table_entries,), torch.int32, VISION, FLOW),
        Buffer("patches", (image_tokens, vision.patch_dim), f32, VISION, VISION),
        *_stream_buffers("vision", image_tokens, vision.width, dtype, VISION, VISION, with_sums=True),
        Buffer("vision_qkv", (image_tokens, 3 * vision.width), dtype, VISION, VISION),
        Buffer("vision_mixed", (image_tokens, vision.width), dtype, VISION, VISION),
        Buffer("vision_hidden", (image_tokens, vision.mlp_dim), dtype, VISION, VISION),
        Buffer("prompt", (plan.batch, plan.prompt_rows, llm.width), f32, VISION, PREFIX),
        *_stream_buffers("prefix", tokens, llm.width, dtype, VISION, PREFIX),
        Buffer("prefix_q", (tokens, llm.q_dim), dtype, PREFIX, PREFIX),
        Buffer("prefix_mixed", (tokens, llm.q_dim), dtype, PREFIX, PREFIX),
        Buffer("prefix_hidden", (tokens, llm.mlp_dim), dtype, PREFIX, PREFIX),
        Buffer("cache_k", (llm.depth, tokens, llm.kv_dim), dtype, PREFIX, FLOW),
        Buffer("cache_v", (llm.depth, tokens, llm.kv_dim), dtype, PREFIX, FLOW),
        Buffer("state", (plan.state_rows, config.action_dim), f32, VISION, FLOW),
        Buffer("actions", (actions, config.action_dim), f32, VISION, FLOW),
        # The chunk that this one continues (rtc/guidance.py); zeros where there is none.
        Buffer("previous", (actions, config.action_dim), f32, VISION, FLOW),
        Buffer("prefix_weights", (actions,), f32, VISION, FLOW),
        Buffer("max_weight", (1,), f32, VISION, FLOW),
        Buffer("time_index", (actions if plan.per_token_time else 0,), torch.int32, VISION, FLOW),
        Buffer("base", (based, config.action_dim), f32, FLOW, FLOW),
        Buffer("action_hidden", (actions, expert.width), f32, FLOW, FLOW),
        *_stream_buffers("suffix", suffix, expert.width, dtype, FLOW, FLOW),
        Buffer("suffix_q", (suffix, expert.q_dim), dtype, FLOW, FLOW),
        Buffer("suffix_k", (expert.depth, suffix, expert.kv_dim), dtype, FLOW, FLOW),
        Buffer("suffix_v", (expert.depth, suffix, expert.kv_dim), dtype, FLOW, FLOW),
        Buffer("suffix_mixed", (suffix, expert.q_dim), dtype, FLOW, FLOW),
        Buffer("suffix_hidden", (suffix, expert.mlp_dim), dtype, FLOW, FLOW),
    ]


def _stream_buffers(
    name: str, rows: int, width: int, dtype: torch.dtype, first: int, last: int, *, with_sums: bool = False
) -> list[Buffer]:
    """The parts of a :class:`~pi0_engine.kernels.stream.Stream`: ``NAME_x``, ``NAME_rounded``, ..."""
    sums = Buffer(f"{name}_sums", (rows, sum_blocks(width)), torch.float32, first, last)
    return [
        Buffer(f"{name}_x", (rows, width), torch.float32, first, last),
        Buffer(f"{name}_rounded", (rows, width), dtype, first, last),
        dataclasses.replace(sums, name=f"{name}_square_sums"),
        *([sums] if with_sums else []),
    ]


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
        vision, prefix, suffix: residual streams [images * patches, W], [B * P, W], [action and state tokens, W].
        lengths: int32 [B] valid prefix rows; ``masked_lengths`` is the same, or None where every row is valid.
        prefix_positions [B * P], suffix_positions [action and state tokens]: int32 RoPE positions.
        time_index: int32 [action tokens], 1 at flow time 0 and 0 at the step's, or None where all are at the step's.
        rope_table: float32 [positions, head_dim], cosines then sines.
        scratch: working memory of the ops, shared by all plans of an engine.
    """

    def __init__(
        self, config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> None:
        buffers = plan_buffers(config, plan, dtype)
        offsets, size = place_buffers(buffers)
        longest = max(buffers, key=lambda b: math.prod(b.shape))
        if math.prod(longest.shape) >= _MOST_ELEMENTS:
            raise ValueError(
                f"{plan.batch} observations with {plan.samples} samples each are too many at once: buffer "
                f"{longest.name} has {math.prod(longest.shape)} elements, kernels count up to {_MOST_ELEMENTS - 1}"
            )
        self.plan, self.scratch = plan, scratch
        self.arena = torch.zeros(size, dtype=torch.uint8, device=device)
        self._tensors = {
            b.name: self.arena[offsets[b.name] : offsets[b.name] + b.nbytes].view(b.dtype).view(b.shape)
            for b in buffers
        }
        self.vision, self.prefix, self.suffix = (self._stream(name) for name in ("vision", "prefix", "suffix"))
        self.lengths = torch.zeros(plan.batch, dtype=torch.int32, device=device)
        self.masked_lengths = None if plan.exact else self.lengths
        self.time_index = self["time_index"] if plan.per_token_time else None
        self.prefix_positions = torch.arange(plan.prefix, dtype=torch.int32, device=device).repeat(plan.batch)
        self.suffix_positions = torch.zeros(plan.suffix_rows, dtype=torch.int32, device=device)
        # Relative to the observation's prefix: the state token comes first, the actions follow.
        after_state = torch.arange(plan.horizon, dtype=torch.int32) + (1 if plan.state_rows else 0)
        self._suffix_offsets = torch.cat([after_state.repeat(plan.chunks), torch.zeros(plan.state_rows)]).int()
        self._observation_of = torch.cat(
            [
                torch.arange(plan.batch).repeat_interleave(plan.samples * plan.horizon),
                torch.arange(plan.batch)[: plan.state_rows],
            ]
        )
        positions = plan.prefix + plan.horizon + 1
        self.rope_table = rope_table(positions, config.llm.head_dim).to(device)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def _stream(self, name: str) -> Stream:
        parts = ("x", "rounded", "square_sums", "sums")
        return Stream(**{part: self._tensors[f"{name}_{part}"] for part in parts if f"{name}_{part}" in self._tensors})

    def set_lengths(self, lengths: Tensor) -> None:
        """Take valid prefix rows, int [B] on the host; every position behind the prefix follows from them."""
        self.lengths.copy_(lengths)
        self.suffix_positions.copy_(self.suffix_positions_after(lengths))

    def suffix_positions_after(self, lengths: Tensor) -> Tensor:
        """int [action and state tokens], on the host, for valid prefix rows int [B]."""
        return self._suffix_offsets + lengths[self._observation_of]


def rope_table(positions: int, head_dim: int) -> Tensor:
    """float32 [positions, head_dim]: cosines of position / 10000^(2i / head_dim), then sines.

    The angle is rounded to float32 as openpi's is; its cosine and sine are then exact to float32.
    """
    inv_freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq).double()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT

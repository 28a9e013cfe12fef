"""Checkpoint tensors -> the packed, folded weights that the stages multiply by.

Folding is exact algebra, done in float32 and rounded once: a norm's weight goes into the linear layer behind it,
``action_in_proj`` into the action half of ``action_time_mlp_in``. What shares an input is stacked: q, k, v; gate, up.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pi0_engine.checkpoints.parameters import parameter_shapes
from pi0_engine.config import Pi0Config
from pi0_engine.engine.heap import freed_blocks_return

#: Elements that are scaled in float32 at a time, 4 MB: loading then peaks at 1.15 times the packed weights; pieces of
#: 16 MB leave holes in the heap and peak at 1.4 times.
_PIECE = 1 << 20


class TensorSource(Protocol):
    """What the engine needs of a checkpoint: its sizes, and its tensors by canonical name."""

    @property
    def config(self) -> Pi0Config: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class VisionLayerWeights:
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


@dataclass(frozen=True)
class VisionWeights:
    """``position`` float32 [patches, W] includes the patch projection's bias; ``patch`` is [W, p * p * 3]."""

    patch: Tensor
    position: Tensor
    projector: Tensor
    projector_bias: Tensor
    layers: list[VisionLayerWeights]


@dataclass(frozen=True)
class DecoderLayerWeights:
    """One Gemma layer. The language model's last layer has only ``qkv`` = [k, v]: nobody reads the rest."""

    qkv: Tensor
    o: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None


@dataclass(frozen=True)
class ActionWeights:
    """From noisy actions to suffix tokens. π0.5 has only ``embed``, π0 also the MLP's second layer and the state.

    ``embed`` is [W, A]: π0's folds the action half of ``action_time_mlp_in`` with ``action_in_proj``.
    """

    embed: Tensor
    mlp_out: Tensor | None
    mlp_out_bias: Tensor | None
    state: Tensor | None
    state_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """Everything resident on the device, and the memory-mapped embedding table, which stays on the host."""

    vision: VisionWeights
    llm: list[DecoderLayerWeights]
    expert: list[DecoderLayerWeights]
    action: ActionWeights
    embed_tokens: Tensor

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed weights; the embedding table is not among them."""
        return sum(_nbytes(part) for part in (self.vision, self.llm, self.expert, self.action))


def pack_weights(source: TensorSource, dtype: torch.dtype, device: torch.device, *, progress: bool = False) -> Weights:
    """Read, fold and pack every tensor that sampling needs, a few layers at a time.

    Host memory beyond the packed weights stays at the tensors in flight: one layer per thread.

    Raises:
        ValueError: whatever the source raises for a tensor it cannot give.
    """
    config, pack = source.config, _Packer(source, dtype, device)
    depth, fold = config.llm.depth, not config.is_pi05
    with freed_blocks_return(), ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        ends = pool.submit(pack.vision_ends)
        vision = [pool.submit(pack.vision_layer, i) for i in range(config.vision.depth)]
        llm = [pool.submit(pack.decoder_layer, f"llm.layers.{i}", True, i == depth - 1) for i in range(depth)]
        expert = [pool.submit(pack.decoder_layer, f"expert.layers.{i}", fold, False) for i in range(depth)]
        action = pool.submit(pack.action)
        parts: list[Future[Any]] = [ends, *vision, *llm, *expert, action]
        try:
            for part in tqdm(as_completed(parts), "packing weights", len(parts), disable=not progress, leave=False):
                part.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Weights(
        vision=VisionWeights(*ends.result(), layers=[part.result() for part in vision]),
        llm=[part.result() for part in llm],
        expert=[part.result() for part in expert],
        action=action.result(),
        embed_tokens=source.tensor("llm.embed_tokens.weight"),
    )


def shapes_only(config: Pi0Config) -> TensorSource:
    """A checkpoint of tensors without contents, for counting."""
    return _ShapesOnly(config)


class _ShapesOnly:
    def __init__(self, config: Pi0Config) -> None:
        self.config = config
        self._shapes = parameter_shapes(config)

    def tensor(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


class _Packer:
    """Reads tensors by name and stores packed ones in the engine's dtype on its device."""

    def __init__(self, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.config, self.dtype, self.device = source, source.config, dtype, device
        self.shapes = parameter_shapes(source.config)

    def read(self, name: str) -> Tensor:
        return self.source.tensor(name)

    def f32(self, name: str) -> Tensor:
        return self.read(name).float()

    def store(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy that owns its memory (the source may be a memory map)."""
        return torch.empty(value.shape, dtype=dtype or self.dtype, device=self.device).copy_(value)

    def empty_stack(self, names: list[str]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Memory for several [n, K] weights under each other, and its parts."""
        rows = [self.shapes[name][0] for name in names]
        packed = torch.empty(sum(rows), self.shapes[names[0]][1], dtype=self.dtype, device=self.device)
        return packed, packed.split(rows)

    def stack(self, names: list[str], column_scale: Tensor | None) -> Tensor:
        """Rows of several [n, K] weights, each column times ``column_scale`` [K], read one at a time."""
        packed, parts = self.empty_stack(names)
        for name, part in zip(names, parts, strict=True):
            _fill(part, self.read(name), column_scale)
        return packed

    def vision_ends(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """patch, position, projector, projector_bias of :class:`VisionWeights`."""
        patch = self.f32("vision.patch_embedding.weight").permute(0, 2, 3, 1).flatten(1)
        position = self.f32("vision.position_embedding.weight") + self.f32("vision.patch_embedding.bias")
        projector, projector_bias = self.after_layernorm(["projector"], "vision.post_norm")
        # Pixels and patch weights stay float32: 0.1 % of the work, and openpi keeps them so (modeling_siglip.py).
        f32 = torch.float32
        return self.store(patch, f32), self.store(position, f32), projector, projector_bias

    def after_layernorm(self, linears: list[str], norm: str) -> tuple[Tensor, Tensor]:
        """Stacked linears with the LayerNorm in front folded in: W diag(w) less each row's mean, and b + W b_norm.

        A row of mean 0 does not see the mean of what it multiplies, so nobody has to subtract that one.
        """
        scale, shift = self.f32(f"{norm}.weight"), self.f32(f"{norm}.bias")
        packed, parts = self.empty_stack([f"{name}.weight" for name in linears])
        biases = []
        for name, part in zip(linears, parts, strict=True):
            weight = self.f32(f"{name}.weight")
            scaled = weight * scale
            part.copy_(scaled.sub_(scaled.mean(dim=1, keepdim=True)))
            biases.append(self.f32(f"{name}.bias") + weight @ shift)
        return packed, self.store(torch.cat(biases), torch.float32)

    def vision_layer(self, index: int) -> VisionLayerWeights:
        layer = f"vision.layers.{index}"
        qkv, qkv_bias = self.after_layernorm([f"{layer}.{p}_proj" for p in "qkv"], f"{layer}.norm1")
        fc1, fc1_bias = self.after_layernorm([f"{layer}.fc1"], f"{layer}.norm2")
        out, fc2 = (self.store(self.read(f"{layer}.{name}.weight")) for name in ("out_proj", "fc2"))
        out_bias, fc2_bias = (
            self.store(self.read(f"{layer}.{name}.bias"), torch.float32) for name in ("out_proj", "fc2")
        )
        return VisionLayerWeights(qkv, qkv_bias, out, out_bias, fc1, fc1_bias, fc2, fc2_bias)

    def decoder_layer(self, layer: str, fold_norms: bool, keys_only: bool) -> DecoderLayerWeights:
        """``fold_norms`` is false for adaRMS, whose scale changes with the flow step."""

        def scale(norm: str) -> Tensor | None:
            return 1.0 + self.f32(f"{layer}.{norm}.weight") if fold_norms else None

        def stack(parts: tuple[str, ...], norm: str) -> Tensor:
            return self.stack([f"{layer}.{part}_proj.weight" for part in parts], scale(norm))

        if keys_only:
            return DecoderLayerWeights(stack(("k", "v"), "input_norm"), None, None, None)
        return DecoderLayerWeights(
            qkv=stack(("q", "k", "v"), "input_norm"),
            o=self.store(self.read(f"{layer}.o_proj.weight")),
            gate_up=stack(("gate", "up"), "post_attention_norm"),
            down=self.store(self.read(f"{layer}.down_proj.weight")),
        )

    def action(self) -> ActionWeights:
        # These projections stay float32 (openpi keeps them so): 1 % of a flow step's bytes, and the path by which
        # the actions' full precision enters.
        f32 = torch.float32
        embed = self.f32("action_in_proj.weight")
        if self.config.is_pi05:
            return ActionWeights(self.store(embed, f32), None, None, None, None)
        action_half = self.f32("action_time_mlp_in.weight")[:, : self.config.expert.width]
        folded = (action_half.double() @ embed.double()).float()
        names = ("action_time_mlp_out.weight", "action_time_mlp_out.bias", "state_proj.weight", "state_proj.bias")
        return ActionWeights(self.store(folded, f32), *(self.store(self.read(name), f32) for name in names))


def _fill(target: Tensor, weight: Tensor, column_scale: Tensor | None) -> None:
    """target [n, K] = weight [n, K], each column times ``column_scale`` [K]; multiplied in float32, rounded once."""
    if column_scale is None:
        target.copy_(weight)
        return
    pieces = max(1, weight.numel() // _PIECE)
    for rows, piece in zip(target.tensor_split(pieces), weight.tensor_split(pieces), strict=True):
        rows.copy_(piece.float() * column_scale)


def _nbytes(part: object) -> int:
    if isinstance(part, Tensor):
        return part.numel() * part.element_size()
    if isinstance(part, list):
        return sum(_nbytes(item) for item in part)
    if part is None:
        return 0
    assert is_dataclass(part)
    return sum(_nbytes(getattr(part, f.name)) for f in fields(part))

"""The layers of the reference model: SigLIP's encoder, Gemma's decoder, and attention over one or two towers.

Read ``model.py`` first. Plain PyTorch, nothing fused; shapes as there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0_engine.config import GemmaConfig, SiglipConfig

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
#: Fill of forbidden logits: finite, so that a fully masked (padding) query stays finite. openpi's value.
MASKED_LOGIT = -2.3819763e38


class RMSNorm(nn.Module):
    """Gemma's norm: x / rms(x) * (1 + w), statistics in float32 (openpi ``modeling_gemma.py``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [..., width] -> (normed x in x.dtype, no gate)."""
        return (rms_normalize(x) * (1.0 + self.weight.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """adaRMS of π0.5: scale, shift and residual gate come from the flow time instead of a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [B, S, W], cond float32 [B, W] -> (normed x, gate [B, 1, W]), both in x.dtype.

        With a cond of each token, [B, S, W], the gate is [B, S, W] too.
        """
        assert cond is not None
        modulation = self.dense(cond)
        scale, shift, gate = (modulation if cond.ndim == 3 else modulation[:, None, :]).chunk(3, dim=-1)
        return (rms_normalize(x) * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)


def rms_normalize(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)


Norm = RMSNorm | AdaRMSNorm


class VisionLayer(nn.Module):
    """Pre-LN transformer encoder layer with biases everywhere and full attention."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.norm1 = nn.LayerNorm(c.width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(c.width, eps=NORM_EPS)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))
        self.fc1 = nn.Linear(c.width, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, patches, width] -> the same shape."""
        normed = self.norm1(x)
        q, k, v = (p(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self._qkv())
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))

    def _qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class VisionTower(nn.Module):
    """SigLIP without class token or pooling head."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size)
        self.position_embedding = nn.Embedding(c.num_patches, c.width)
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.depth))
        self.post_norm = nn.LayerNorm(c.width, eps=NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """images float32 [N, 3, S, S] in [-1, 1] -> [N, patches, width]. Patches are row-major."""
        x = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position_embedding.weight
        x = x.to(self.post_norm.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.post_norm(x)


class GemmaLayer(nn.Module):
    """The weights of one decoder layer. :func:`joint_layer` runs one or two of them over shared attention."""

    def __init__(self, c: GemmaConfig, norm: type[Norm]) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.width, c.q_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_dim, bias=False)
        self.o_proj = nn.Linear(c.q_dim, c.width, bias=False)
        self.gate_proj = nn.Linear(c.width, c.mlp_dim, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_dim, bias=False)
        self.down_proj = nn.Linear(c.mlp_dim, c.width, bias=False)
        self.input_norm = norm(c.width)
        self.post_attention_norm = norm(c.width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaTower(nn.Module):
    """A stack of decoder layers; the language model also embeds tokens."""

    def __init__(self, c: GemmaConfig, norm: type[Norm]) -> None:
        super().__init__()
        if c.vocab_size is not None:
            self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(GemmaLayer(c, norm) for _ in range(c.depth))
        self.norm = norm(c.width)


@dataclass
class Stream:
    """Tokens [B, n, width] that one tower's weights carry through the layers, with the adaRMS condition if any."""

    tower: GemmaTower
    x: Tensor
    cond: Tensor | None = None


#: Per layer: keys after RoPE and values, each [B, kv_heads, tokens, head_dim].
KVCache = list[tuple[Tensor, Tensor]]


@functools.cache
def inverse_frequencies(head_dim: int, device: torch.device) -> Tensor:
    """float32 [head_dim / 2], the same bits on every device: computed on the CPU and kept where it is used."""
    return (ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)).to(device)


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding in half-split form.

    x [B, heads, n, head_dim], positions int [B, n]. The angle of pair (i, i + head_dim/2) is
    position / 10000^(2i / head_dim), rounded to float32; the rotation is done in x.dtype.
    """
    angle = positions[:, None, :, None].float() * inverse_frequencies(x.shape[-1], x.device)
    cos, sin = angle.double().cos().to(x.dtype), angle.double().sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Masked softmax attention with grouped KV heads.

    q [B, heads, n, hd], k and v [B, kv_heads, m, hd], allowed bool [B, n, m] -> [B, n, heads * hd]. Softmax in float32.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    probs = logits.float().masked_fill(~allowed[:, None], MASKED_LOGIT).softmax(dim=-1).to(v.dtype)
    return (probs @ v).transpose(1, 2).flatten(2)


def joint_layer(
    index: int, streams: list[Stream], positions: Tensor, allowed: Tensor, past: KVCache | None
) -> tuple[Tensor, Tensor]:
    """One decoder layer over the tokens of all streams, which attend together but keep their own weights.

    positions int [B, n] and allowed bool [B, n, m] cover the concatenated streams; m = past keys + n.
    Updates ``stream.x`` in place and returns the layer's keys and values for a cache.
    """
    layers = [cast(GemmaLayer, s.tower.layers[index]) for s in streams]
    qs: list[Tensor] = []
    ks: list[Tensor] = []
    vs: list[Tensor] = []
    gates: list[Tensor | None] = []
    for s, layer in zip(streams, layers, strict=True):
        normed, gate = layer.input_norm(s.x, s.cond)
        for out, proj in ((qs, layer.q_proj), (ks, layer.k_proj), (vs, layer.v_proj)):
            out.append(proj(normed).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2))
        gates.append(gate)
    q, k, v = rope(torch.cat(qs, dim=2), positions), rope(torch.cat(ks, dim=2), positions), torch.cat(vs, dim=2)
    if past is not None:
        past_k, past_v = past[index]
        mixed = attention(q, torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2), allowed)
    else:
        mixed = attention(q, k, v, allowed)
    parts = mixed.split([s.x.shape[1] for s in streams], dim=1)
    for s, layer, part, gate in zip(streams, layers, parts, gates, strict=True):
        s.x = gated_residual(s.x, layer.o_proj(part), gate)
        normed, gate = layer.post_attention_norm(s.x, s.cond)
        s.x = gated_residual(s.x, layer.mlp(normed), gate)
    return k, v


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y, or x + y * gate where adaRMS gives a gate."""
    return x + y if gate is None else x + y * gate

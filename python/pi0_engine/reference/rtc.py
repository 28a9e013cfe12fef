"""Real-time chunking on the reference model: the oracle of what the engine does in its Euler step (docs/rtc.md).

Guided sampling in plain autograd. ``jacobian="full"`` is the paper's correction, a vector-Jacobian product through the
whole network; ``"identity"`` leaves the network's Jacobian out, as lerobot does, and is what the engine computes.
Sampling with a given prefix, for models trained with one, needs no gradient: its tokens are at flow time 0.

Shape letters as in ``model.py``; all tensors float32, actions in network units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pi0_engine.config import SolverName
from pi0_engine.reference.layers import KVCache
from pi0_engine.reference.model import Pi0Reference, flow_times, integrate

Jacobian = Literal["identity", "full"]


def guidance_weight(time: Tensor, max_weight: float) -> Tensor:
    """min(max_weight, (1 - tau) / tau * 1 / r^2) with tau = 1 - time and r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2).

    From Real-Time Execution of Action Chunking Flow Policies, whose time tau runs from noise (0) to actions (1).
    float64; ``max_weight`` where it would be infinite.
    """
    tau = 1.0 - time.double()
    r_squared = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    return ((1 - tau) / tau / r_squared).clamp(max=max_weight)


def guided_velocity(
    model: Pi0Reference,
    state: Tensor,
    prefix_pad: Tensor,
    cache: KVCache,
    x_t: Tensor,
    time: Tensor,
    previous: Tensor,
    weights: Tensor,
    max_weight: float,
    jacobian: Jacobian,
) -> Tensor:
    """The velocity [B, H, A] less w(t) times the correction (d x1 / d x)^T (W (previous - x1)), x1 = x - t v(x).

    ``time`` is a scalar, ``previous`` [B, H, A], ``weights`` [B, H].
    """
    if jacobian not in ("identity", "full"):
        raise ValueError(f"jacobian is {jacobian!r}, expected 'identity' or 'full'")
    times = time.expand(x_t.shape[0])
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(jacobian == "full")
        v = model.velocity(state, prefix_pad, cache, x, times)
        foreseen = x - time * v
        correction = (weights[..., None] * (previous - foreseen)).detach()
        if jacobian == "full":
            (correction,) = torch.autograd.grad(foreseen, x, correction)
    return (v - guidance_weight(time, max_weight) * correction).detach().to(x_t.dtype)


@torch.no_grad()
def sample_guided(
    model: Pi0Reference,
    images: Tensor,
    image_masks: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    state: Tensor,
    noise: Tensor,
    previous: Tensor,
    weights: Tensor,
    max_weight: float,
    *,
    jacobian: Jacobian = "identity",
    num_steps: int | None = None,
) -> Tensor:
    """``Pi0Reference.sample_actions``, each step pulled towards ``previous`` [B, H, A] by ``weights`` [B, H]."""
    prefix, pad_mask = model.embed_prefix(images, image_masks, tokens, token_mask)
    cache = model.prefill(prefix, pad_mask)
    x_t = noise
    for time, dt in flow_times(model.config.num_steps if num_steps is None else num_steps):
        v = guided_velocity(model, state, pad_mask, cache, x_t, time, previous, weights, max_weight, jacobian)
        x_t = x_t + dt * v
    return x_t


@torch.no_grad()
def sample_with_prefix(
    model: Pi0Reference,
    images: Tensor,
    image_masks: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    state: Tensor,
    noise: Tensor,
    previous: Tensor,
    rows: Sequence[int],
    *,
    num_steps: int | None = None,
    solver: SolverName = "euler",
) -> Tensor:
    """``Pi0Reference.sample_actions`` of a π0.5 whose first ``rows[b]`` actions are given: those of ``previous``.

    They stay as they are in every step, at flow time 0, where actions are clean (Training-Time Action Conditioning for
    Efficient Real-Time Chunking, whose time runs the other way).
    """
    given = torch.arange(noise.shape[1])[None, :] < torch.tensor(rows)[:, None]
    prefix, pad_mask = model.embed_prefix(images, image_masks, tokens, token_mask)
    cache = model.prefill(prefix, pad_mask)

    def velocity(x_t: Tensor, time: Tensor) -> Tensor:
        v = model.velocity(state, pad_mask, cache, x_t, torch.where(given, 0.0, time))
        return v.masked_fill(given[..., None], 0.0)

    start = torch.where(given[..., None], previous, noise)
    return integrate(velocity, start, model.config.num_steps if num_steps is None else num_steps, solver)

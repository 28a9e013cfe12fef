"""The oracle: π0 and π0.5 in plain PyTorch, one idea per function, nothing fused, nothing dropped.

Every camera slot and every padding token is computed and masked, as openpi does; the engine drops them.
The engine must agree with this model, and this model with openpi's recorded outputs (docs/parity.md).

``dtype=torch.bfloat16`` reproduces openpi's mixed precision: which tensors are stored in which type, and where a
result is rounded (``gemma_pytorch.py``, ``to_bfloat16_for_selected_params``). One thing is deliberately not
reproduced: openpi's PyTorch model also rounds the RoPE frequencies to bfloat16, which turns positions near 800 by
more than a radian and costs 1 % of the actions. Here they are exact, as in openpi's JAX model.

Shape letters: B batch, V camera slots, P prefix tokens, S suffix tokens, H action horizon, W expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0_engine.config import Pi0Config, SolverName
from pi0_engine.reference.layers import AdaRMSNorm, GemmaTower, KVCache, RMSNorm, Stream, VisionTower, joint_layer


def blockwise_causal(pad_mask: Tensor, starts_block: Tensor) -> Tensor:
    """Which token may attend to which, bool [B, n, n].

    A token sees every valid token of its own block and of all earlier blocks. ``pad_mask`` bool [B, n] marks valid
    tokens, ``starts_block`` bool [n] the tokens that open a new block (openpi ``make_att_2d_masks``).
    """
    block = starts_block.long().cumsum(dim=0)
    allowed = block[None, :] <= block[:, None]
    return allowed[None] & pad_mask[:, None, :] & pad_mask[:, :, None]


def time_embedding(time: Tensor, width: int) -> Tensor:
    """sin and cos of the flow time, float32 [...] -> float32 [..., width].

    Periods run geometrically from 4e-3 to 4; computed in float64, because at the shortest period float32 angles
    (up to 1571 rad) are off by 1e-4 (openpi ``create_sinusoidal_pos_embedding``).
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    angle = time.double()[..., None] * (2 * math.pi / (4e-3 * (4.0 / 4e-3) ** fraction))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def flow_times(num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(time, dt) of each flow step from noise (1) to actions (0), accumulated in float32 as openpi does."""
    dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32)
    time = torch.tensor(1.0, dtype=torch.float32)
    for _ in range(num_steps):
        yield time, dt
        time = time + dt


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_steps: int, solver: SolverName = "euler"
) -> Tensor:
    """Solve dx/dt = velocity(x, t) from t = 1, where x is ``x``, to t = 0, in ``num_steps`` equal steps.

    ``euler`` is what openpi does. ``midpoint`` (Runge's, two velocities per step) and ``adams_bashforth`` (two steps
    back, begun by Euler's step) are of second order: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations
    I, sections II.1 and III.1.

    Args:
        velocity: of x and of the time, a float32 scalar.
    """
    before: Tensor | None = None
    for time, dt in flow_times(num_steps):
        v = velocity(x, time)
        if solver == "midpoint":
            v = velocity(x + dt / 2 * v, time + dt / 2)
        if solver == "adams_bashforth":
            v, before = (v if before is None else 1.5 * v - 0.5 * before), v
        x = x + dt * v
    return x


class Pi0Reference(nn.Module):
    """π0 or π0.5. Parameter names are the canonical ones of ``parameters.py``.

    Args:
        config: sizes and model type.
        dtype: ``torch.float32``, or ``torch.bfloat16`` for openpi's mixed precision with exact RoPE.
    """

    def __init__(self, config: Pi0Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
        self.config = config
        width, action_dim = config.expert.width, config.action_dim
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.llm.width)
        self.llm = GemmaTower(config.llm, RMSNorm)
        self.expert = GemmaTower(config.expert, AdaRMSNorm if config.is_pi05 else RMSNorm)
        self.action_in_proj = nn.Linear(action_dim, width)
        self.action_out_proj = nn.Linear(width, action_dim)
        if config.is_pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(storage_dtype(name, dtype))

    @classmethod
    def from_tensors(
        cls, config: Pi0Config, tensor: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
    ) -> Pi0Reference:
        """Build from a function that gives each tensor by canonical name, for example ``checkpoint.tensor``."""
        with torch.device("meta"):
            model = cls(config, dtype)
        for name, parameter in list(model.named_parameters()):
            value = tensor(name)
            if tuple(value.shape) != tuple(parameter.shape):
                raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(parameter.shape)}")
            if dtype == torch.bfloat16 and not keeps_full_values(name):
                value = value.to(torch.bfloat16)
            owner, leaf = name.rpartition(".")[::2]
            filled = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, filled)
        return model.eval()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.projector.weight.dtype

    def embed_images(self, images: Tensor) -> Tensor:
        """images float32 [B, V, S, S, 3] -> [B, V * patches, llm width], unscaled (openpi drops the 1/sqrt(width))."""
        batch = images.shape[0]
        features = self.vision(images.flatten(0, 1).permute(0, 3, 1, 2))
        return self.projector(features).unflatten(0, (batch, -1)).flatten(1, 2)

    def embed_prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> tokens [B, P, llm width] in the order images, prompt; valid mask bool [B, P]."""
        prompt = self.llm.embed_tokens(tokens) * math.sqrt(self.config.llm.width)
        pad_mask = torch.cat([image_masks.repeat_interleave(self.config.vision.num_patches, dim=1), token_mask], dim=1)
        return torch.cat([self.embed_images(images), prompt], dim=1), pad_mask

    def prefill(self, prefix: Tensor, pad_mask: Tensor) -> KVCache:
        """Run the language model over the prefix [B, P, width] and keep each layer's keys and values."""
        allowed = blockwise_causal(pad_mask, torch.zeros(prefix.shape[1], dtype=torch.bool, device=prefix.device))
        stream = Stream(self.llm, prefix)
        positions = prefix_positions(pad_mask)
        return [joint_layer(i, [stream], positions, allowed, None) for i in range(self.config.llm.depth)]

    def embed_suffix(self, state: Tensor, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """state float32 [B, A], noisy actions float32 [B, H, A], time float32 [B] -> (tokens [B, S, W], adaRMS cond).

        π0: S = 1 + H (state first) and no condition. π0.5: S = H and cond float32 [B, W], or [B, H, W] where each token
        has a time of its own, [B, H].
        """
        action = self.action_in_proj(x_t)
        time_emb = time_embedding(time, self.config.expert.width)
        if self.config.is_pi05:
            return action, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_emb))))
        both = torch.cat([action, time_emb[:, None, :].expand_as(action)], dim=-1)
        action = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
        return torch.cat([self.state_proj(state)[:, None, :], action], dim=1), None

    def velocity(self, state: Tensor, prefix_pad: Tensor, cache: KVCache, x_t: Tensor, time: Tensor) -> Tensor:
        """One flow step: dx/dt float32 [B, H, A] of noisy actions x_t [B, H, A] at time [B], given the prefix cache.

        π0.5 also takes a time of each token, [B, H].
        """
        suffix, cond = self.embed_suffix(state, x_t, time)
        suffix_allowed = blockwise_causal(prefix_pad.new_ones(suffix.shape[:2]), self._suffix_blocks(suffix))
        to_prefix = prefix_pad[:, None, :].expand(-1, suffix.shape[1], -1)
        allowed = torch.cat([to_prefix, suffix_allowed], dim=2)
        offsets = torch.arange(suffix.shape[1], device=suffix.device)
        positions = prefix_pad.sum(dim=1, keepdim=True) + offsets
        stream = Stream(self.expert, suffix.to(self.compute_dtype), cond)
        for i in range(self.config.expert.depth):
            joint_layer(i, [stream], positions, allowed, cache)
        return self._project_actions(stream, x_t.shape[1])

    def joint_velocity(self, prefix: Tensor, prefix_pad: Tensor, state: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """The same velocity in one pass over [images + prompt | state | actions], as in training."""
        suffix, cond = self.embed_suffix(state, x_t, time)
        pad_mask = torch.cat([prefix_pad, prefix_pad.new_ones(suffix.shape[:2])], dim=1)
        starts_block = torch.cat([prefix_pad.new_zeros(prefix.shape[1]), self._suffix_blocks(suffix)])
        allowed = blockwise_causal(pad_mask, starts_block)
        streams = [Stream(self.llm, prefix), Stream(self.expert, suffix.to(self.compute_dtype), cond)]
        for i in range(self.config.llm.depth):
            joint_layer(i, streams, prefix_positions(pad_mask), allowed, None)
        return self._project_actions(streams[1], x_t.shape[1])

    @torch.no_grad()
    def sample_actions(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
        noise: Tensor,
        num_steps: int | None = None,
        solver: SolverName = "euler",
    ) -> Tensor:
        """Integrate the flow from noise float32 [B, H, A] to a chunk of normalised actions float32 [B, H, A]."""
        prefix, pad_mask = self.embed_prefix(images, image_masks, tokens, token_mask)
        cache = self.prefill(prefix, pad_mask)

        def velocity(x_t: Tensor, time: Tensor) -> Tensor:
            return self.velocity(state, pad_mask, cache, x_t, time.to(x_t.device).expand(x_t.shape[0]))

        return integrate(velocity, noise, self.config.num_steps if num_steps is None else num_steps, solver)

    def loss(
        self, prefix: Tensor, prefix_pad: Tensor, state: Tensor, actions: Tensor, noise: Tensor, time: Tensor
    ) -> Tensor:
        """Flow-matching loss [B, H]: squared error of the velocity at x_t = t * noise + (1 - t) * actions.

        The target is noise - actions, because time runs from actions (0) to noise (1). Draw ``time`` with
        :func:`sample_training_time`.
        """
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * actions
        error = self.joint_velocity(prefix, prefix_pad, state, x_t, time) - (noise - actions)
        return error.square().mean(dim=-1)

    def _suffix_blocks(self, suffix: Tensor) -> Tensor:
        """Which suffix tokens open a block: π0 [state | actions], π0.5 [actions]."""
        starts = torch.zeros(suffix.shape[1], dtype=torch.bool, device=suffix.device)
        starts[: 1 if self.config.is_pi05 else 2] = True
        return starts

    def _project_actions(self, stream: Stream, horizon: int) -> Tensor:
        normed, _ = self.expert.norm(stream.x, stream.cond)
        return self.action_out_proj(normed[:, -horizon:].float())


def prefix_positions(pad_mask: Tensor) -> Tensor:
    """RoPE positions int [B, n]: masked tokens do not advance the count."""
    return pad_mask.long().cumsum(dim=1) - 1


def sample_training_time(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Flow times float32 [batch] for training: Beta(1.5, 1) squeezed into (0.001, 1), which favours noisy inputs.

    Beta(a, 1) has the distribution function t^a, so t = u^(1/a) with uniform u (π0 paper, appendix B).
    """
    return torch.rand(batch, generator=generator) ** (1 / 1.5) * 0.999 + 0.001


def keeps_full_values(name: str) -> bool:
    """Whether bfloat16 mode keeps a parameter's float32 values: the projections outside the two Gemmas and SigLIP."""
    return not name.startswith(("vision.", "projector.", "llm.", "expert."))


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which openpi holds a parameter: norms of the Gemmas, patch and position embeddings stay float32."""
    gemma_norm = name.startswith(("llm.", "expert.")) and "norm." in name
    embedding = name.startswith(("vision.patch_embedding", "vision.position_embedding"))
    return torch.float32 if keeps_full_values(name) or gemma_norm or embedding else dtype

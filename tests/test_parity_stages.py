"""The engine against the reference at every buffer that any op writes, in the order of the data flow. Parity, step 2.

The engine's ops run as always; a wrapper copies what each has written. The reference runs once with every submodule
recorded. The two are paired write by write, so that a mistake is reported where it first shows: stage, layer, buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import golden
from models import MODEL_TYPES, Recorder, engine, random_inputs, random_noise, reference, rel_l2, small_config
from pi0_engine.config import Pi0Config
from pi0_engine.engine.pipeline import run
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.runtime import Engine
from pi0_engine.inputs import ModelInputs
from pi0_engine.kernels.registry import Ops, all_ops
from pi0_engine.reference import flow_times, prefix_positions
from pi0_engine.reference_layers import rope

TOLERANCE = 2e-5
_OUTPUTS = ("out", "residual", "actions", "q", "k", "v")


class CopyingOps(Ops):
    """Runs real ops and keeps a copy of every tensor that each has written, as (op.argument, tensor)."""

    def __init__(self, ops: Ops) -> None:
        super().__init__({name: functools.partial(self._run, getattr(ops, name), name) for name in all_ops()}, ())
        self.written: list[tuple[str, Tensor]] = []

    def _run(self, function: Any, name: str, *args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        outputs = [(f"{name}.{key}", kwargs[key]) for key in _OUTPUTS if kwargs.get(key) is not None]
        self.written.extend((label, tensor.clone()) for label, tensor in outputs)


@dataclass(frozen=True)
class Write:
    """What the reference says an op writes: ``op`` is "op.argument", ``rows`` the valid rows of each batch entry."""

    where: str
    op: str
    expected: list[Tensor]


class Expected:
    """The reference's tensors in the engine's layout, for a batch of B observations (one chunk each)."""

    def __init__(self, config: Pi0Config, inputs: ModelInputs, noise: Tensor, num_steps: int) -> None:
        model, i = reference(config), inputs
        self.config, self.inputs, self.num_steps = config, inputs, num_steps
        with Recorder(model) as self.seen, torch.no_grad():
            self.actions = model.sample_actions(
                i.images, i.image_masks, i.tokens, i.token_mask, i.state, noise, num_steps
            )
        self.valid = torch.cat([i.image_masks.repeat_interleave(config.vision.num_patches, dim=1), i.token_mask], dim=1)
        self.present = i.image_masks.flatten()

    def into(self, module: str, call: int = 0) -> Tensor:
        return self.seen.inputs[module][call]

    def out_of(self, module: str, call: int = 0) -> Tensor:
        return self.seen.outputs[module][call]

    def writes(self) -> Iterator[Write]:
        """Every write of one inference, in order."""
        if self.present.any():
            yield from self.vision()
        yield from self.prefix()
        if not self.config.is_pi05:
            yield from self.state()
        for step in range(self.num_steps):
            yield from self.flow_step(step)

    def vision(self) -> Iterator[Write]:
        def write(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"vision {where}", op, list(tensor[self.present]))

        yield write("patch embedding", "patch_embed.out", self.into("vision.layers.0"))
        for n in range(self.config.vision.depth):
            layer = f"vision.layers.{n}"
            qkv = torch.cat([self.out_of(f"{layer}.{p}_proj") for p in "qkv"], dim=-1)
            yield write(f"layer {n} qkv", "layernorm_linear.out", qkv)
            yield write(f"layer {n} attention", "vision_attention.out", self.into(f"{layer}.out_proj"))
            yield write(f"layer {n} x after attention", "linear_residual.residual", self.into(f"{layer}.norm2"))
            yield write(f"layer {n} MLP", "layernorm_linear.out", self.into(f"{layer}.fc2"))
            yield write(f"layer {n} x", "linear_residual.residual", self.out_of(layer))
        tokens = self.out_of("projector").unflatten(0, (self.inputs.batch, -1))
        for b, mask in enumerate(self.inputs.image_masks):
            if mask.any():
                yield Write(f"vision projector of observation {b}", "layernorm_linear.out", list(tokens[b, mask]))

    def prefix(self) -> Iterator[Write]:
        def write(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"prefix {where}", op, [rows[valid] for rows, valid in zip(tensor, self.valid, strict=True)])

        depth, positions = self.config.llm.depth, prefix_positions(self.valid)
        for n in range(depth):
            layer = f"llm.layers.{n}"
            q, k = (self.rotated(f"{layer}.{p}_proj", 0, positions) for p in "qk")
            if n < depth - 1:
                yield write(f"layer {n} q", "rmsnorm_qkv_rope.q", q)
            yield write(f"layer {n} cached k", "rmsnorm_qkv_rope.k", k)
            yield write(f"layer {n} cached v", "rmsnorm_qkv_rope.v", self.out_of(f"{layer}.v_proj"))
            if n == depth - 1:
                return
            after = f"{layer}.post_attention_norm"
            yield write(f"layer {n} attention", "prefix_attention.out", self.into(f"{layer}.o_proj"))
            yield write(f"layer {n} x after attention", "linear_residual.residual", self.into(after))
            yield write(f"layer {n} MLP", "rmsnorm_geglu.out", self.into(f"{layer}.down_proj"))
            yield write(f"layer {n} x", "linear_residual.residual", self.into(f"llm.layers.{n + 1}.input_norm"))

    def state(self) -> Iterator[Write]:
        """Row 0 of the reference's suffix, which is the same in every step."""

        def write(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"state {where}", op, list(tensor[:, :1]))

        yield write("embedding", "linear.out", self.into("expert.layers.0.input_norm"))
        for n in range(self.config.expert.depth):
            layer, last = f"expert.layers.{n}", n == self.config.expert.depth - 1
            q, k = (self.rotated(f"{layer}.{p}_proj", 0, self.suffix_positions()) for p in "qk")
            yield write(f"layer {n} q", "rmsnorm_qkv_rope.q", q)
            yield write(f"layer {n} cached k", "rmsnorm_qkv_rope.k", k)
            yield write(f"layer {n} cached v", "rmsnorm_qkv_rope.v", self.out_of(f"{layer}.v_proj"))
            if last:
                return
            after = f"{layer}.post_attention_norm"
            yield write(f"layer {n} attention", "prefix_attention.out", self.into(f"{layer}.o_proj"))
            yield write(f"layer {n} x after attention", "linear_residual.residual", self.into(after))
            yield write(f"layer {n} MLP", "rmsnorm_geglu.out", self.into(f"{layer}.down_proj"))
            yield write(f"layer {n} x", "linear_residual.residual", self.into(f"expert.layers.{n + 1}.input_norm"))

    def flow_step(self, step: int) -> Iterator[Write]:
        """The action rows of the reference's suffix."""
        horizon, depth = self.actions.shape[1], self.config.expert.depth

        def write(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"flow step {step} {where}", op, list(tensor[:, -horizon:]))

        if not self.config.is_pi05:
            yield write("action MLP", "linear.out", F.silu(self.out_of("action_time_mlp_in", step)))
        yield write("embedding", "linear.out", self.into("expert.layers.0.input_norm", step))
        for n in range(depth):
            layer = f"expert.layers.{n}"
            q, k = (self.rotated(f"{layer}.{p}_proj", step, self.suffix_positions()) for p in "qk")
            yield write(f"layer {n} q", "rmsnorm_qkv_rope.q", q)
            yield write(f"layer {n} k", "rmsnorm_qkv_rope.k", k)
            yield write(f"layer {n} v", "rmsnorm_qkv_rope.v", self.out_of(f"{layer}.v_proj", step))
            after, following = f"{layer}.post_attention_norm", f"expert.layers.{n + 1}.input_norm"
            yield write(f"layer {n} attention", "suffix_attention.out", self.into(f"{layer}.o_proj", step))
            yield write(f"layer {n} x after attention", "linear_residual.residual", self.into(after, step))
            yield write(f"layer {n} MLP", "rmsnorm_geglu.out", self.into(f"{layer}.down_proj", step))
            x = self.into("expert.norm" if n == depth - 1 else following, step)
            yield write(f"layer {n} x", "linear_residual.residual", x)
        last = step == self.num_steps - 1
        x_t = self.actions if last else self.into("action_in_proj", step + 1)
        yield write("actions", "rmsnorm_linear_euler.actions", x_t)

    def suffix_positions(self) -> Tensor:
        count = self.actions.shape[1] + (0 if self.config.is_pi05 else 1)
        return self.valid.sum(dim=1, keepdim=True) + torch.arange(count)

    def rotated(self, projection: str, call: int, positions: Tensor) -> Tensor:
        """Queries or keys behind RoPE, [B, n, heads * head_dim]."""
        heads = self.out_of(projection, call).unflatten(-1, (-1, self.config.llm.head_dim)).transpose(1, 2)
        return rope(heads, positions).transpose(1, 2).flatten(2)


def engine_writes(running: Engine, inputs: ModelInputs, noise: Tensor, num_steps: int) -> list[tuple[str, Tensor]]:
    """(op.argument, copy of the tensor) of every write of one inference, in order."""
    ops = CopyingOps(running.ops)
    plan = ShapePlan.of(
        running.config,
        views=inputs.image_masks.sum(dim=1).tolist(),
        prompt_lengths=inputs.token_mask.sum(dim=1).tolist(),
        horizon=noise.shape[2],
        num_steps=num_steps,
        prompt_bucket=running.engine_config.prompt_bucket,
    )
    with torch.inference_mode():
        space = running.workspace(plan)
        running._load(inputs, noise, space)
        run(ops, running.config, running.weights, running.time_terms(num_steps), space, lambda stage: None)
    return ops.written


def compare(running: Engine, inputs: ModelInputs, noise: Tensor, num_steps: int) -> int:
    """Compare every write; the number of writes. The first that differs fails, by name."""
    expected = list(Expected(running.config, inputs, noise[:, 0], num_steps).writes())
    written = engine_writes(running, inputs, noise, num_steps)
    for number, (write, (op, actual)) in enumerate(zip(expected, written, strict=True)):
        assert op == write.op, f"write {number}: the engine ran {op}, expected {write.op} ({write.where})"
        valid = [rows[: len(wanted)] for rows, wanted in zip(actual, write.expected, strict=True)]
        error = rel_l2(torch.cat(valid), torch.cat(write.expected))
        assert error <= TOLERANCE, f"{write.where} ({op}): relative L2 {error:.2e}"
    return len(written)


@pytest.mark.parametrize("case", ["pi0_tiny_c04_batch2", "pi05_tiny_p03_batch2"])
def test_every_write_of_a_recorded_case(case: str) -> None:
    """Two observations, 3 and 2 cameras (the middle one masked), prompts of different lengths."""
    loaded = golden.load(case)
    count = compare(engine(golden.config_of(case)), loaded.inputs, loaded.noise[:, None], 3)
    vision, prefix, state, flow = 1 + 2 * 5 + 2, 2 * 7 + 2, 1 + 2 * 7 + 3, 3 * (1 + 3 * 7 + 1)
    assert count == vision + prefix + flow + (0 if case.startswith("pi05") else state + 3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bucket", [1, 8])
def test_every_write_with_absent_cameras_and_prompts(model_type: Any, bucket: int) -> None:
    config = small_config(model_type)
    inputs = random_inputs(config, [[False, False, False, False], [False, True, False, True]], [3, 0])
    compare(engine(config, prompt_bucket=bucket), inputs, random_noise(config, 2), 2)


def test_a_wrong_layer_is_named() -> None:
    """The comparison itself: one disturbed weight is reported at the first buffer that it reaches."""
    from models import fresh_engine

    config = small_config("pi0")
    running = fresh_engine(config)
    down = running.weights.llm[1].down
    assert down is not None
    down *= 1.001
    with pytest.raises(AssertionError, match=r"prefix layer 1 x \(linear_residual\.residual\): relative L2"):
        compare(running, random_inputs(config), random_noise(config), 1)


def test_flow_grid_of_the_comparison() -> None:
    """The reference's recorded calls are one per step, in order of time."""
    config = small_config("pi0")
    expected = Expected(config, random_inputs(config), random_noise(config)[:, 0], 3)
    assert len(expected.seen.inputs["action_in_proj"]) == len(list(flow_times(3)))

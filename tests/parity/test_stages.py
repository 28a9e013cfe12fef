"""The engine against the reference at every buffer that any op writes, in the order of the data flow. Parity, step 2.

The engine's ops run as always; a wrapper copies what each has written. The reference runs once with every submodule
recorded. The two are paired write by write, so that a mistake is reported where it first shows: stage, layer, buffer.
A write to a residual stream is compared in all of its parts: the rows, their copy for the next norm, and their sums.
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

from pi0_engine.config import Pi0Config
from pi0_engine.engine.pipeline import run
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.runtime import Engine
from pi0_engine.inputs import ModelInputs
from pi0_engine.kernels.registry import Ops, all_ops
from pi0_engine.kernels.stream import Stream
from pi0_engine.reference.layers import rope
from pi0_engine.reference.model import flow_times, prefix_positions
from tests.support import golden
from tests.support.models import (
    MODEL_TYPES,
    Recorder,
    engine,
    random_inputs,
    random_noise,
    reference,
    rel_l2,
    small_config,
    tensors,
)

TOLERANCE = 2e-5
_OUTPUTS = ("out", "hidden", "residual", "actions", "q", "k", "v")


class CopyingOps(Ops):
    """Runs real ops and keeps a copy of every tensor that each has written, as (op.argument, tensor).

    Of a stream that is "op.argument" for the rows and "op.argument.part" for its other parts.
    """

    def __init__(self, ops: Ops) -> None:
        super().__init__({name: functools.partial(self._run, getattr(ops, name), name) for name in all_ops()}, ())
        self.written: list[tuple[str, Tensor]] = []

    def _run(self, function: Any, name: str, *args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        for key in _OUTPUTS:
            written = kwargs.get(key)
            if isinstance(written, Stream):
                self.written.append((f"{name}.{key}", written.x.clone()))
                parts = [(part, tensor) for part, tensor in written.tensors.items() if part != "x"]
                self.written.extend((f"{name}.{key}.{part}", tensor.clone()) for part, tensor in parts)
            elif written is not None:
                self.written.append((f"{name}.{key}", written.flatten(0, -2).clone()))


@dataclass(frozen=True)
class Write:
    """What the reference says an op writes: ``op`` is "op.argument", ``rows`` which of the written rows (None: all)."""

    where: str
    op: str
    expected: Tensor
    rows: Tensor | None = None


def stream_writes(write: Write, next_scale: Tensor | None, *, sums: bool = False) -> Iterator[Write]:
    """The parts of a residual stream whose rows are ``write``. ``next_scale`` [W], or [rows, W], is the next norm's."""
    x = write.expected.double()

    def part(name: str, expected: Tensor) -> Write:
        return Write(f"{write.where}, {name}", f"{write.op}.{name}", expected, write.rows)

    def block_sums(values: Tensor) -> Tensor:
        return torch.stack([block.sum(dim=-1) for block in values.split(64, dim=-1)], dim=-1)

    yield write
    yield part("rounded", x if next_scale is None else x * next_scale)
    yield part("square_sums", block_sums(x.square()))
    if sums:
        yield part("sums", block_sums(x))


class Expected:
    """The reference's tensors in the engine's layout, for a batch of B observations (one chunk each)."""

    def __init__(self, config: Pi0Config, plan: ShapePlan, inputs: ModelInputs, noise: Tensor, num_steps: int) -> None:
        model, i = reference(config), tensors(inputs)
        self.config, self.plan, self.inputs, self.num_steps = config, plan, inputs, num_steps
        with Recorder(model) as self.seen, torch.no_grad():
            self.actions = model.sample_actions(*i, noise, num_steps)
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
            state = self.into("expert.layers.0.input_norm")[:, 0]
            yield from stream_writes(Write("flow state token", "linear.out", state), None)
        for step in range(self.num_steps):
            yield from self.flow_step(step)

    def vision(self) -> Iterator[Write]:
        def write(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"vision {where}", op, tensor[self.present].flatten(0, 1))

        x = write("patch embedding", "patch_embed.out", self.into("vision.layers.0"))
        yield from stream_writes(x, None, sums=True)
        for n in range(self.config.vision.depth):
            layer = f"vision.layers.{n}"
            qkv = torch.cat([self.out_of(f"{layer}.{p}_proj") for p in "qkv"], dim=-1)
            yield write(f"layer {n} qkv", "layernorm_linear.out", qkv)
            yield write(f"layer {n} attention", "vision_attention.out", self.into(f"{layer}.out_proj"))
            x = write(f"layer {n} x after attention", "linear_residual.residual", self.into(f"{layer}.norm2"))
            yield from stream_writes(x, None, sums=True)
            yield write(f"layer {n} MLP", "layernorm_linear.out", self.into(f"{layer}.fc2"))
            x = write(f"layer {n} x", "linear_residual.residual", self.out_of(layer))
            yield from stream_writes(x, None, sums=True)
        tokens = self.out_of("projector").unflatten(0, (self.inputs.batch, -1))
        for b, mask in enumerate(torch.from_numpy(self.inputs.image_masks)):
            if mask.any():
                rows = tokens[b, mask].flatten(0, 1)
                yield from stream_writes(
                    Write(f"vision projector of observation {b}", "layernorm_linear.out", rows), None
                )

    def prefix(self) -> Iterator[Write]:
        """The engine's rows: those of the longest observation for each; the valid ones come first."""
        counts = self.valid.sum(dim=1)
        # Row r of observation b is valid if r < counts[b]; the plan has the rows that a bucket asks for.
        rows = torch.cat([b * self.plan.prefix + torch.arange(count) for b, count in enumerate(counts.tolist())])

        def write(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"prefix {where}", op, tensor[self.valid], rows)

        embedded = self.into("llm.layers.0.input_norm")
        for b, start in enumerate(self.plan.image_rows):
            if start < self.plan.prefix:
                # Behind the last token come zeros, in every part of the stream.
                prompt = torch.zeros(self.plan.prefix - start, self.config.llm.width)
                own = embedded[b, -self.inputs.tokens.shape[1] :][self.inputs.token_mask[b]]
                prompt[: len(own)] = own
                yield from stream_writes(Write(f"prefix prompt of observation {b}", "embed_prompt.out", prompt), None)
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
            after, following = f"{layer}.post_attention_norm", f"llm.layers.{n + 1}.input_norm"
            yield write(f"layer {n} attention", "prefix_attention.out", self.into(f"{layer}.o_proj"))
            x = write(f"layer {n} x after attention", "linear_residual.residual", self.into(after))
            yield from stream_writes(x, None)
            yield write(f"layer {n} MLP", "rmsnorm_geglu.out", self.into(f"{layer}.down_proj"))
            yield from stream_writes(write(f"layer {n} x", "linear_residual.residual", self.into(following)), None)

    def flow_step(self, step: int) -> Iterator[Write]:
        """The reference's suffix [B, state and actions]: all actions first, the state tokens behind, in step 0 only."""
        horizon, depth = self.actions.shape[1], self.config.expert.depth
        states = 0 if self.config.is_pi05 or step > 0 else 1

        def actions(where: str, op: str, tensor: Tensor) -> Write:
            return Write(f"flow step {step} {where}", op, tensor[:, -horizon:].flatten(0, 1))

        def write(where: str, op: str, tensor: Tensor) -> Write:
            rows = [tensor[:, -horizon:].flatten(0, 1), *([tensor[:, 0]] if states else [])]
            return Write(f"flow step {step} {where}", op, torch.cat(rows))

        if not self.config.is_pi05:
            yield actions("action MLP", "linear.out", F.silu(self.out_of("action_time_mlp_in", step)))
        x = actions("embedding", "linear.out", self.into("expert.layers.0.input_norm", step))
        yield from stream_writes(x, self.scale("expert.layers.0.input_norm", step))
        for n in range(depth):
            layer, last = f"expert.layers.{n}", n == depth - 1
            q, k = (self.rotated(f"{layer}.{p}_proj", step, self.suffix_positions()) for p in "qk")
            yield write(f"layer {n} q", "rmsnorm_qkv_rope.q", q)
            yield write(f"layer {n} k", "rmsnorm_qkv_rope.k", k)
            yield write(f"layer {n} v", "rmsnorm_qkv_rope.v", self.out_of(f"{layer}.v_proj", step))
            after, following = f"{layer}.post_attention_norm", f"expert.layers.{n + 1}.input_norm"
            yield write(f"layer {n} attention", "suffix_attention.out", self.into(f"{layer}.o_proj", step))
            x = write(f"layer {n} x after attention", "linear_residual.residual", self.into(after, step))
            yield from stream_writes(x, self.scale(after, step))
            yield write(f"layer {n} MLP", "rmsnorm_mlp_residual.hidden", self.into(f"{layer}.down_proj", step))
            x = write(
                f"layer {n} x", "rmsnorm_mlp_residual.residual", self.into("expert.norm" if last else following, step)
            )
            # The final norm's scale is in the output projection.
            yield from stream_writes(x, None if last else self.scale(following, step))
        x_t = self.actions if step == self.num_steps - 1 else self.into("action_in_proj", step + 1)
        yield actions("actions", "rmsnorm_linear_euler.actions", x_t)

    def scale(self, norm: str, step: int) -> Tensor | None:
        """adaRMS's scale [W], of all observations alike: 1 + the first third of what the norm's dense layer gives."""
        if not self.config.is_pi05:
            return None
        return 1 + self.out_of(f"{norm}.dense", step)[0].chunk(3)[0]

    def suffix_positions(self) -> Tensor:
        count = self.actions.shape[1] + (0 if self.config.is_pi05 else 1)
        return self.valid.sum(dim=1, keepdim=True) + torch.arange(count)

    def rotated(self, projection: str, call: int, positions: Tensor) -> Tensor:
        """Queries or keys behind RoPE, [B, n, heads * head_dim]."""
        heads = self.out_of(projection, call).unflatten(-1, (-1, self.config.llm.head_dim)).transpose(1, 2)
        return rope(heads, positions).transpose(1, 2).flatten(2)


def plan_of(running: Engine, inputs: ModelInputs, noise: Tensor, num_steps: int) -> ShapePlan:
    return running.plan(
        views=inputs.image_masks.sum(axis=1).tolist(),
        prompt_lengths=inputs.token_mask.sum(axis=1).tolist(),
        horizon=noise.shape[2],
        num_steps=num_steps,
    )


def engine_writes(running: Engine, plan: ShapePlan, inputs: ModelInputs, noise: Tensor) -> list[tuple[str, Tensor]]:
    """(op.argument, copy of the tensor) of every write of one inference, in order."""
    ops, session = CopyingOps(running.ops), running.session(plan)
    with torch.inference_mode():
        session.load_observation(inputs, running._embed)
        session.load_noise(noise)
        steps = running.time_terms(plan.num_steps)
        run(ops, running.config, running.weights, steps, session.space, lambda stage: None)
    return ops.written


def compare(running: Engine, inputs: ModelInputs, noise: Tensor, num_steps: int) -> int:
    """Compare every write; the number of writes. The first that differs fails, by name."""
    plan = plan_of(running, inputs, noise, num_steps)
    expected = list(Expected(running.config, plan, inputs, noise[:, 0], num_steps).writes())
    written = engine_writes(running, plan, inputs, noise)
    for number, (write, (op, actual)) in enumerate(zip(expected, written, strict=True)):
        assert op == write.op, f"write {number}: the engine ran {op}, expected {write.op} ({write.where})"
        actual = actual if write.rows is None else actual[write.rows]
        error = rel_l2(actual, write.expected) if write.expected.any() else float(actual.abs().max())
        assert error <= TOLERANCE, f"{write.where} ({op}): relative L2 {error:.2e}"
    return len(written)


@pytest.mark.parametrize("case", ["pi0_tiny_c04_batch2", "pi05_tiny_p03_batch2"])
def test_every_write_of_a_recorded_case(case: str) -> None:
    """Two observations, 3 and 2 cameras (the middle one masked), prompts of different lengths."""
    loaded = golden.load(case)
    count = compare(engine(golden.config_of(case)), loaded.inputs, loaded.noise[:, None], 3)
    # A write to SigLIP's stream has four parts, to the others three.
    vision, prefix = 4 + 2 * (1 + 1 + 4 + 1 + 4) + 2 * 3, 2 * 3 + 2 * (4 + 3 + 1 + 3) + 2
    flow = 3 * (3 + 3 * (4 + 3 + 1 + 3) + 1)
    assert count == vision + prefix + flow + (0 if case.startswith("pi05") else 3 + 3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bucket", [1, 8])
def test_every_write_with_absent_cameras_and_prompts(model_type: Any, bucket: int) -> None:
    config = small_config(model_type)
    inputs = random_inputs(config, [[False, False, False, False], [False, True, False, True]], [3, 0])
    compare(engine(config, prompt_bucket=bucket), inputs, random_noise(config, 2), 2)


def test_a_wrong_layer_is_named() -> None:
    """The comparison itself: one disturbed weight is reported at the first buffer that it reaches."""
    from tests.support.models import fresh_engine

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
    inputs, noise = random_inputs(config), random_noise(config)
    expected = Expected(config, plan_of(engine(config), inputs, noise, 3), inputs, noise[:, 0], 3)
    assert len(expected.seen.inputs["action_in_proj"]) == len(list(flow_times(3)))

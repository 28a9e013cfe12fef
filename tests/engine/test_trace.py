"""Counting an inference without running it."""

from __future__ import annotations

import functools

import pytest
import torch

from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.pipeline import STAGES, run
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.trace import TracingOps, count_work, record_launches, work_per_stage
from pi0_engine.kernels.gpu.target import parse_target
from pi0_engine.kernels.registry import Cost
from tests.support.models import MODEL_TYPES, engine, random_inputs, random_noise, small_config


@functools.cache
def full_size(model_type: ModelType, views: int, prompt: int) -> dict[str, Cost]:
    config = Pi0Config(model_type)
    plan = ShapePlan.of(config, views=[views], prompt_lengths=[prompt])
    return dict(work_per_stage(count_work(config, plan, torch.bfloat16)))


@pytest.mark.parametrize(("views", "vision", "prefix"), [(1, 0.220, 1.044), (2, 0.440, 2.032), (3, 0.661, 3.038)])
def test_work_of_full_size_pi0(views: int, vision: float, prefix: float) -> None:
    """TFLOP with a prompt of 20 tokens. By hand, for one view:

    vision: per layer 2 * 256 * (4 * 1152^2 + 2 * 1152 * 4304) + 4 * 256^2 * 1152, 27 layers, patches and projector.
    """
    work = full_size("pi0", views, 20)
    assert work["vision"].flops / 1e12 == pytest.approx(vision, abs=5e-4)
    assert work["prefix"].flops / 1e12 == pytest.approx(prefix, abs=5e-4)


def test_vision_work_by_hand() -> None:
    layer = 2 * 256 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 256**2 * 1152
    ends = 2 * 256 * (588 * 1152 + 1152 * 2048)
    assert full_size("pi0", 1, 20)["vision"].flops == 27 * layer + ends


def test_prefix_work_by_hand() -> None:
    """276 tokens through 17 layers and the keys and values of the last."""
    tokens, width, mlp = 276, 2048, 16384
    layer = 2 * tokens * width * (2048 + 2 * 256 + 2048 + 3 * mlp) + 4 * tokens**2 * 2048
    assert full_size("pi0", 1, 20)["prefix"].flops == 17 * layer + 2 * tokens * width * 512


def flow_layer(rows: int) -> int:
    """FLOP of the linear layers of one expert layer."""
    return 2 * rows * 1024 * (2048 + 2 * 256 + 2048 + 3 * 4096)


def test_flow_work_by_hand() -> None:
    """Ten steps of 50 action tokens, whose keys are 532 of the prefix, the chunk's own and the state's.

    And in the first step the state token, which sees the prefix and itself.
    """
    layer = flow_layer(50) + 4 * 50 * (532 + 50 + 1) * 2048
    ends = 2 * 50 * (32 * 1024 + 1024 * 1024 + 1024 * 32)
    state = 2 * 32 * 1024 + 18 * (flow_layer(1) + 4 * (532 + 1) * 2048)
    assert full_size("pi0", 2, 20)["flow"].flops == 10 * (18 * layer + ends) + state
    assert full_size("pi0", 2, 20)["flow"].flops / 1e12 == pytest.approx(0.356, abs=5e-4)
    assert state / 1e12 == pytest.approx(0.0007, abs=5e-5)


def test_flow_work_of_pi05_by_hand() -> None:
    """No state token, no action-time MLP."""
    layer = flow_layer(50) + 4 * 50 * (532 + 50) * 2048
    ends = 2 * 50 * (32 * 1024 + 1024 * 32)
    assert full_size("pi05", 2, 20)["flow"].flops == 10 * (18 * layer + ends)


def test_bytes_of_the_flow_are_mostly_weights() -> None:
    """Every step reads 18 layers of 1024 x (4608 + 12288) bfloat16 weights: 6.2 GB in ten steps.

    The state token reads none of its own: it goes along in the first step.
    """
    weights = 10 * 18 * 2 * 1024 * (2048 + 2 * 256 + 2048 + 3 * 4096)
    assert weights < full_size("pi0", 2, 20)["flow"].bytes < 1.12 * weights
    per_step = full_size("pi05", 2, 20)["flow"].bytes / 10
    assert full_size("pi0", 2, 20)["flow"].bytes - 10 * per_step < 0.13 * per_step


def test_bytes_of_a_small_flow_by_hand() -> None:
    """Every array of one step of the small π0, float32: 4 bytes each. 5 actions, 1 state token; prefix of 11 keys.

    A stream of width 28 has one sum per row: 28 + 28 + 1 values are written, 28 + 1 read by a norm, 28 by a residual.
    """
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3], num_steps=1)
    state = 7 + 28 * 7 + 28 + 57
    embed = (5 * 7 + 28 * 7 + 28 + 5 * 28) + (5 * 28 + 28 * 28 + 28 + 5 * 57)
    qkv = 6 * 29 + (64 + 32) * 28 + 6 * (64 + 32) + 6 * 16
    attention = 2 * 6 * 64 + 2 * 11 * 16 + 2 * 6 * 16
    out = 6 * 64 + 28 * 64 + 6 * 28 + 6 * 57
    mlp = 6 * 29 + 2 * 44 * 28 + 28 * 44 + 2 * 6 * 44 + 6 * 28 + 6 * 57
    euler = 5 * 29 + 7 * 28 + 7 + 2 * 5 * 7 + (5 * 7 + 5 + 1)
    flow = work_per_stage(count_work(config, plan, torch.float32))["flow"]
    assert flow.bytes == 4 * (state + embed + 3 * (qkv + attention + out + mlp) + euler)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_count_is_what_runs(model_type: ModelType) -> None:
    """The same calls, shapes and dtypes on real buffers as on none, and the result is the engine's."""
    config, running = small_config(model_type), engine(small_config(model_type))
    inputs = random_inputs(config, [[True, False, True], [True, True, True]], [3, 12])
    noise = random_noise(config, 2, samples=2)
    expected = running.infer(inputs, noise).actions
    plan = ShapePlan.of(config, views=[2, 3], prompt_lengths=[3, 12], samples=2)
    assert running.plan(views=[2, 3], prompt_lengths=[3, 12], samples=2) == plan
    with torch.inference_mode():
        session = running.session(plan)
        session.load_observation(inputs, running._embed)
        session.load_noise(noise)
        tracer, steps = TracingOps(running.ops), running.time_terms(plan.num_steps)
        run(tracer, config, running.weights, steps, session.space, tracer.lap)
        assert torch.equal(session.actions(), expected)
    assert tracer.calls == count_work(config, plan, torch.float32)
    assert tracer.choices == running.ops.choices


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_number_of_calls(model_type: ModelType) -> None:
    """Five ops per layer of the towers, one in the last prefix layer, four per expert layer."""
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3])
    calls = count_work(config, plan, torch.float32)
    counts = {stage: sum(call.stage == stage for call in calls) for stage in STAGES}
    state, embed = (0, 1) if config.is_pi05 else (1, 2)
    assert STAGES == ("vision", "prefix", "flow")
    assert counts == {"vision": 1 + 5 * 2 + 1, "prefix": 1 + 5 * 2 + 1, "flow": state + 3 * (embed + 4 * 3 + 1)}
    assert set(work_per_stage(calls)) == set(STAGES)


@pytest.mark.parametrize(("model_type", "count"), [("pi0", 975), ("pi05", 964)])
def test_number_of_calls_at_full_size(model_type: ModelType, count: int) -> None:
    """Vision 1 + 27 * 5 + 1, prefix 1 + 17 * 5 + 1, flow 1 + 10 * (2 + 18 * 4 + 1); in π0.5 10 * (1 + 18 * 4 + 1)."""
    config = Pi0Config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[20])
    assert len(count_work(config, plan, torch.bfloat16)) == count


def test_one_call_per_observation_where_their_rows_are_apart() -> None:
    """Projector and prompt of each observation; one without cameras or without room behind them needs none."""
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[0, 1, 3], prompt_lengths=[3, 2, 0])
    calls = count_work(config, plan, torch.float32)
    ops = [(call.stage, call.op) for call in calls]
    assert ops.count(("vision", "patch_embed")) == 1 and ops.count(("prefix", "embed_prompt")) == 2
    assert ops[11:14] == [("vision", "layernorm_linear")] * 2 + [("prefix", "embed_prompt")]
    rows = [
        shape[0] for call in calls if call.op == "embed_prompt" for name, shape, _ in call.shapes if name == "out.x"
    ]
    assert rows == [12, 8]


def test_frames_are_resized_by_the_first_op() -> None:
    config = small_config("pi0")
    arguments = {"views": [2], "prompt_lengths": [3]}
    raw = count_work(config, ShapePlan.of(config, **arguments, frames=(1, 1)), torch.float32)
    resized = count_work(config, ShapePlan.of(config, **arguments), torch.float32)
    assert (raw[0].stage, raw[0].op, raw[1:]) == ("vision", "frames_to_patches", resized)
    assert raw[0].shapes[-1] == ("patches", (2, 4, 588), torch.float32)


def test_the_state_token_goes_along_in_the_first_step() -> None:
    """Two observations with three samples of five actions: 30 rows, 32 in the first step of two."""
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[2, 2], prompt_lengths=[3, 3], samples=3, num_steps=2)
    calls = [call for call in count_work(config, plan, torch.float32) if call.stage == "flow"]
    shapes = [{name: shape for name, shape, _ in call.shapes} for call in calls]
    queries = [s["q"][0] for s, call in zip(shapes, calls, strict=True) if call.op == "rmsnorm_qkv_rope"]
    assert queries == [32] * 3 + [30] * 3
    seen = [(s["0"][0], s["3"][0]) for s, call in zip(shapes, calls, strict=True) if call.op == "suffix_attention"]
    assert seen == [(32, 32)] * 3 + [(30, 32)] * 3
    states = [s["out.x"][0] for s, call in zip(shapes, calls, strict=True) if call.op == "linear" and "out.x" in s]
    assert states == [2, 30, 30]


def test_no_camera_costs_no_vision() -> None:
    config = small_config("pi0")
    work = work_per_stage(count_work(config, ShapePlan.of(config, views=[0], prompt_lengths=[3]), torch.float32))
    assert "vision" not in work


def test_a_call_names_its_tensors() -> None:
    config = small_config("pi0")
    call = count_work(config, ShapePlan.of(config, views=[2], prompt_lengths=[3]), torch.bfloat16)[1]
    assert (call.stage, call.op) == ("vision", "layernorm_linear")
    assert call.shapes == (
        ("0.x", (8, 36), torch.float32),
        ("0.rounded", (8, 36), torch.bfloat16),
        ("0.square_sums", (8, 1), torch.float32),
        ("0.sums", (8, 1), torch.float32),
        ("1", (108, 36), torch.bfloat16),
        ("2", (108,), torch.float32),
        ("out", (8, 108), torch.bfloat16),
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_call_is_one_launch_on_a_gpu(model_type: ModelType) -> None:
    """Recorded on no GPU: the op's own kernel for each call, in the same order."""
    pytest.importorskip("triton")
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[2, 1], prompt_lengths=[3, 5], samples=2)
    calls = count_work(config, plan, torch.bfloat16)
    launches = record_launches(config, plan, torch.bfloat16, parse_target("sm_90"))
    assert [launch.op for launch in launches] == [call.op for call in calls]

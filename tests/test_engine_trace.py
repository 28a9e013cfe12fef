"""Counting an inference without running it."""

from __future__ import annotations

import functools

import pytest
import torch

from models import MODEL_TYPES, engine, random_inputs, random_noise, small_config
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.pipeline import STAGES, run
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.trace import TracingOps, count_work, work_per_stage
from pi0_engine.kernels.registry import Cost


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


def test_flow_work_by_hand() -> None:
    """Ten steps of 50 action tokens; keys are 532 of the prefix, the state's, and the chunk's own."""
    horizon, width, mlp, keys = 50, 1024, 4096, 532 + 1 + 50
    layer = 2 * horizon * width * (2048 + 2 * 256 + 2048 + 3 * mlp) + 4 * horizon * keys * 2048
    ends = 2 * horizon * (32 * width + width * width + width * 32)
    assert full_size("pi0", 2, 20)["flow"].flops == 10 * (18 * layer + ends)
    assert full_size("pi0", 2, 20)["flow"].flops / 1e12 == pytest.approx(0.356, abs=1e-3)


def test_bytes_of_the_flow_are_mostly_weights() -> None:
    """Every step reads 18 layers of 1024 x (4608 + 12288) bfloat16 weights: 6.2 GB in ten steps."""
    weights = 10 * 18 * 2 * 1024 * (2048 + 2 * 256 + 2048 + 3 * 4096)
    assert weights < full_size("pi0", 2, 20)["flow"].bytes < 1.15 * weights


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_count_is_what_runs(model_type: ModelType) -> None:
    """The same calls, shapes and dtypes on real buffers as on none, and the result is the engine's."""
    config, running = small_config(model_type), engine(small_config(model_type))
    inputs = random_inputs(config, [[True, False, True], [True, True, True]], [3, 12])
    noise = random_noise(config, 2, samples=2)
    expected = running.infer(inputs, noise).actions
    plan = ShapePlan.of(config, views=[2, 3], prompt_lengths=[3, 12], samples=2)
    with torch.inference_mode():
        space = running.workspace(plan)
        running._load(inputs, noise, space)
        tracer = TracingOps(running.ops)
        run(tracer, config, running.weights, running.time_terms(plan.num_steps), space, tracer.lap)
        assert torch.equal(space["actions"].view(noise.shape), expected)
    assert tracer.calls == count_work(config, plan, torch.float32)
    assert tracer.choices == running.ops.choices


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_number_of_calls(model_type: ModelType) -> None:
    """Five ops per layer; the last prefix layer, and the state token's, have one."""
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3])
    calls = count_work(config, plan, torch.float32)
    counts = {stage: sum(call.stage == stage for call in calls) for stage in STAGES}
    state, embed = (0, 1) if config.is_pi05 else (1 + 5 * 2 + 1, 2)
    assert counts == {"vision": 1 + 5 * 2 + 1, "prefix": 5 * 2 + 1, "state": state, "flow": 3 * (embed + 5 * 3 + 1)}
    assert set(work_per_stage(calls)) == {stage for stage in STAGES if counts[stage]}


def test_no_camera_costs_no_vision() -> None:
    config = small_config("pi0")
    work = work_per_stage(count_work(config, ShapePlan.of(config, views=[0], prompt_lengths=[3]), torch.float32))
    assert "vision" not in work


def test_a_call_names_its_tensors() -> None:
    config = small_config("pi0")
    call = count_work(config, ShapePlan.of(config, views=[2], prompt_lengths=[3]), torch.bfloat16)[1]
    assert (call.stage, call.op) == ("vision", "layernorm_linear")
    assert call.shapes == (
        ("0", (2, 4, 36), torch.float32),
        ("1", (108, 36), torch.bfloat16),
        ("2", (108,), torch.float32),
        ("out", (2, 4, 108), torch.bfloat16),
    )

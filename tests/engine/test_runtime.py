"""Engine: what it refuses, what it returns, and that one call leaves nothing behind for the next."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pi0_engine.config import EngineConfig, ModelType
from pi0_engine.engine import choices, runtime, session
from pi0_engine.engine.arrays import as_tensor
from pi0_engine.engine.choices import resolve_device, resolve_dtype
from pi0_engine.engine.pipeline import STAGES
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.kernels.gemm import CpuProducts
from tests.support.frames import textured_frame
from tests.support.models import (
    MODEL_TYPES,
    engine,
    fresh_engine,
    random_inputs,
    random_noise,
    reference,
    reference_actions,
    rel_l2,
    small_config,
)

PI0 = small_config("pi0")


def test_actions_and_times() -> None:
    result = engine(PI0).infer(random_inputs(PI0), random_noise(PI0, samples=2))
    assert (result.actions.shape, result.actions.dtype) == ((1, 2, 5, 7), torch.float32)
    assert list(result.seconds) == ["inputs", *STAGES]
    assert all(seconds >= 0 for seconds in result.seconds.values())


def test_actions_are_the_callers_own() -> None:
    """Later calls with the same buffers do not change them."""
    running, noise = engine(PI0), random_noise(PI0)
    first = running.infer(random_inputs(PI0), noise).actions
    kept = first.numpy().copy()
    running.infer(random_inputs(PI0, seed=1), noise)
    assert (first.numpy() == kept).all()
    running.infer(random_inputs(PI0), noise).actions.numpy().fill(0)
    assert torch.equal(running.infer(random_inputs(PI0), noise).actions, first)


def test_actions_are_an_ordinary_tensor() -> None:
    """Not one of inference mode, which could neither be changed nor differentiated through."""
    actions = engine(PI0).infer(random_inputs(PI0), random_noise(PI0)).actions
    actions += 1
    weight = torch.ones(7, requires_grad=True)
    (actions * weight).sum().backward()
    assert weight.grad is not None


def test_broken_weights_do_not_reach_the_robot() -> None:
    running = fresh_engine(PI0)
    running.weights.expert[1].qkv.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model computed NaN or infinity"):
        running.infer(random_inputs(PI0), random_noise(PI0))


def test_inputs_are_not_changed() -> None:
    inputs, noise = random_inputs(PI0), random_noise(PI0)
    arrays = [value for value in vars(inputs).values() if isinstance(value, np.ndarray)] + [noise.numpy()]
    before = [array.copy() for array in arrays]
    engine(PI0).infer(inputs, noise)
    assert len(arrays) == 6 and all(np.array_equal(a, b) for a, b in zip(before, arrays, strict=True))


def test_inputs_are_looked_at_where_they_are() -> None:
    """No copy of an array on its way into the engine, but of those that torch cannot look at."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert as_tensor(array).data_ptr() == array.ctypes.data
    assert as_tensor(array.T).data_ptr() == array.ctypes.data
    backwards, fixed = array[:, ::-1], array.copy()
    fixed.flags.writeable = False
    for given in (backwards, fixed):
        np.testing.assert_array_equal(as_tensor(given).numpy(), given)
        assert as_tensor(given).data_ptr() != given.ctypes.data
    tensor = torch.ones(2)
    assert as_tensor(tensor) is tensor
    records = np.zeros(3, [("a", "<f4"), ("b", "i1")])
    for given in (records["a"], np.arange(3, dtype=">f4")):
        np.testing.assert_array_equal(as_tensor(given).numpy(), given)


@pytest.mark.parametrize(
    ("noise", "given"),
    [([[0.0]], "list"), (np.array(["a"]), "<U1"), (np.zeros(2, np.longdouble), "float128"), (None, "NoneType")],
)
def test_noise_that_is_no_numbers_is_named(noise: Any, given: str) -> None:
    with pytest.raises(ValueError, match=f"given is {given}.*expected numbers in a numpy array or a tensor"):
        engine(PI0).infer(random_inputs(PI0), noise)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shapes_in_any_order_give_what_a_fresh_engine_gives(model_type: ModelType) -> None:
    """Buffers still hold the last call's values, larger and smaller ones, of this plan and of others."""
    config = small_config(model_type)
    used = fresh_engine(config, max_plans=2)
    all_present, one = (True, True, True), (False, True, False)
    calls: list[tuple[list[Any], list[int], int, int]] = [
        ([all_present], [12], 3, 5),
        ([one], [0], 1, 1),
        ([all_present, one], [2, 12], 1, 9),
        ([one, all_present], [12, 2], 2, 5),
        ([all_present], [12], 3, 5),
        ([one], [1], 1, 1),
        ([all_present, one], [2, 12], 1, 9),
    ]
    for seed, (cameras, lengths, samples, horizon) in enumerate(calls):
        inputs = random_inputs(config, cameras, lengths, seed=seed)
        noise = random_noise(config, len(cameras), samples, horizon)
        fresh = fresh_engine(config).infer(inputs, noise).actions
        assert torch.equal(used.infer(inputs, noise).actions, fresh), f"call {seed}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_is_read_that_this_call_did_not_write(model_type: ModelType, dtype: str) -> None:
    """NaN in every byte of every buffer before the call, padding rows of a shorter prefix included."""
    config = small_config(model_type)
    running = fresh_engine(config, dtype, prompt_bucket=8)
    inputs = random_inputs(config, [[True, True, True], [False, True, False]], [12, 1])
    noise = random_noise(config, 2, samples=2)
    expected = running.infer(inputs, noise).actions
    (session,) = running._sessions.values()
    space = session.space
    with torch.inference_mode():
        space.arena.fill_(0xFF)
        space.lengths.fill_(-1)
        space.suffix_positions.fill_(-1)
        assert all(space[name].isnan().all() for name in ("prompt", "prefix_x", "cache_k", "suffix_k", "suffix_hidden"))
    assert torch.equal(running.infer(inputs, noise).actions, expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_frames_give_what_their_resized_images_give(backend: str) -> None:
    """Bit for bit, of any sizes, in an engine that has resized others; absent cameras have no frame."""
    running, preprocess = fresh_engine(PI0, backend=backend), FramePreprocessor(size=28)
    masks = [[True, False, True], [False, True, False]]
    for sides in ([(30, 40), (28, 28), (9, 5)], [(480, 640), (20, 100), (1, 1)], [(30, 40), (28, 28), (9, 5)]):
        frames = [textured_frame(*side) for side in sides]
        inputs, noise = random_inputs(PI0, masks, [3, 5]), random_noise(PI0, 2)
        raw = dataclasses.replace(inputs, images=None, frames=(tuple(frames[:2]), tuple(frames[2:])))
        resized = raw.resized(preprocess)
        assert resized.frames is None
        np.testing.assert_array_equal(resized.pixels[0, 2], preprocess(frames)[1])
        assert not resized.pixels[0, 1].any()
        assert torch.equal(running.infer(raw, noise).actions, running.infer(resized, noise).actions)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_observe_and_sample_are_the_halves_of_infer(model_type: ModelType) -> None:
    """Look once, draw several times; bit for bit what one inference gives."""
    config = small_config(model_type)
    running, inputs = fresh_engine(config), random_inputs(config, [[True, False, True], [True, True, True]], [3, 12])
    noises = [random_noise(config, 2, samples=2), random_noise(config, 2, samples=2) + 1]
    expected = [running.infer(inputs, noise, num_steps=2).actions for noise in noises]
    with pytest.raises(ValueError, match="there is no observation to sample from"):
        running.sample(noises[0])
    assert list(running.observe(inputs, samples=2, num_steps=2)) == ["inputs", "vision", "prefix"]
    for noise, actions in [*zip(noises, expected, strict=True)] * 2:
        drawn = running.sample(noise)
        assert list(drawn.seconds) == ["inputs", "flow"] and torch.equal(drawn.actions, actions)
    with pytest.raises(ValueError, match=r"noise is \[2, 1, 5, 7\], observed for 2 samples of horizon 5"):
        running.sample(random_noise(config, 2))
    running.infer(inputs, noises[0])
    with pytest.raises(ValueError, match="there is no observation to sample from"):
        running.sample(noises[0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_step_counts_in_any_order(model_type: ModelType) -> None:
    config = small_config(model_type)
    running, model, inputs, noise = engine(config), reference(config), random_inputs(config), random_noise(config)
    for num_steps in (7, 1, 3, None, 12, 7):
        actions = running.infer(inputs, noise, num_steps=num_steps).actions
        assert rel_l2(actions, reference_actions(model, inputs, noise, num_steps)) <= 2e-5


def test_a_broken_call_leaves_nothing_behind() -> None:
    running, inputs, noise = fresh_engine(PI0), random_inputs(PI0), random_noise(PI0)
    expected = running.infer(inputs, noise).actions
    with pytest.raises(ValueError, match="state contains NaN or infinity"):
        running.infer(dataclasses.replace(inputs, state=inputs.state * np.float32(np.nan)), noise)
    assert torch.equal(running.infer(inputs, noise).actions, expected)


def test_strided_inputs_are_taken_as_they_are() -> None:
    inputs, noise = random_inputs(PI0), random_noise(PI0)
    expected = engine(PI0).infer(inputs, noise).actions
    strided = dataclasses.replace(
        inputs,
        images=np.asfortranarray(inputs.images),
        tokens=inputs.tokens.repeat(2, axis=1)[:, ::2],
        state=inputs.state.repeat(2, axis=1)[:, ::2],
    )
    actions = engine(PI0).infer(strided, noise.transpose(2, 3).contiguous().transpose(2, 3)).actions
    assert torch.equal(actions, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_last_number_of_a_batchs_noise_is_looked_at(value: float) -> None:
    noise = random_noise(PI0, 2, samples=2)
    noise[-1, -1, -1, -1] = value
    with pytest.raises(ValueError, match="noise contains NaN or infinity"):
        engine(PI0).infer(random_inputs(PI0, [[True, True, True]] * 2, [5, 3]), noise)


def test_actions_of_the_last_observation_that_are_not_finite_are_noticed() -> None:
    """A prompt of NaN reaches that observation's chunk alone."""
    running = fresh_engine(PI0)
    inputs = random_inputs(PI0, [[True, True, True]] * 2, [5, 5])
    inputs.tokens[0, :5], inputs.tokens[1, :5] = 1, 2
    running.infer(inputs, random_noise(PI0, 2))
    running.weights.embed_tokens[2] = torch.nan
    with pytest.raises(ValueError, match="the model computed NaN or infinity"):
        running.infer(inputs, random_noise(PI0, 2))


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are written to memory of the host's and uploaded, as for a GPU; the device here is the CPU."""
    monkeypatch.setattr(session, "_host_twin", lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))


@pytest.mark.usefixtures("staged")
def test_what_is_staged_and_uploaded_gives_the_same() -> None:
    for cameras, prompts in (([[True] * 3], [5]), ([[True, False, True], [False, True, False]], [4, 0])):
        inputs, noise = random_inputs(PI0, cameras, prompts), random_noise(PI0, len(cameras), samples=2)
        assert torch.equal(fresh_engine(PI0).infer(inputs, noise).actions, engine(PI0).infer(inputs, noise).actions)


@pytest.mark.usefixtures("staged")
def test_a_prompt_of_the_same_length_is_embedded_anew() -> None:
    """What a session remembers of a prompt is its words, not their number. It remembers them where memory is staged."""
    running, noise = fresh_engine(PI0), random_noise(PI0)
    inputs = random_inputs(PI0)
    first = running.infer(inputs, noise).actions
    other = dataclasses.replace(inputs, tokens=(inputs.tokens + 1) % 97)
    second = running.infer(other, noise).actions
    assert not torch.equal(first, second)
    assert torch.equal(fresh_engine(PI0).infer(other, noise).actions, second)
    assert torch.equal(running.infer(inputs, noise).actions, first)


def test_pi05_does_not_read_the_state() -> None:
    config = small_config("pi05")
    inputs, noise = random_inputs(config), random_noise(config)
    expected = engine(config).infer(inputs, noise).actions
    other = dataclasses.replace(inputs, state=inputs.state + 1)
    assert torch.equal(engine(config).infer(other, noise).actions, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n[:, 0], r"noise is torch\.float32 \[1, 5, 7\], expected float32 \[1, samples, horizon, 7\]"),
        (lambda n: n.double(), r"noise is torch\.float64 \[1, 1, 5, 7\]"),
        (lambda n: n[..., :6], r"noise is torch\.float32 \[1, 1, 5, 6\]"),
        (lambda n: n.expand(2, -1, -1, -1), r"noise is torch\.float32 \[2, 1, 5, 7\], expected float32 \[1, "),
        (lambda n: n[:, :0], r"noise is torch\.float32 \[1, 0, 5, 7\]"),
        (lambda n: n[:, :, :0], r"noise is torch\.float32 \[1, 1, 0, 7\]"),
        (lambda n: n / 0, "noise contains NaN or infinity"),
    ],
)
def test_unusable_noise_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(PI0).infer(random_inputs(PI0), change(random_noise(PI0)))


def test_no_flow_step_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 0, expected "):
        engine(PI0).infer(random_inputs(PI0), random_noise(PI0), num_steps=0)


def test_the_least_recently_used_plan_is_freed() -> None:
    running = fresh_engine(PI0, max_plans=2)
    a, b, c = ([length] for length in (1, 2, 3))

    def infer(lengths: list[int]) -> None:
        running.infer(random_inputs(PI0, prompt_lengths=lengths), random_noise(PI0))

    def kept() -> set[int]:
        return {plan.prefix - 3 * 4 for plan in running._sessions}

    infer(a)
    first = next(iter(running._sessions.values()))
    infer(b)
    infer(a)
    assert first in running._sessions.values()
    infer(c)
    assert kept() == {1, 3}


def test_a_new_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pi0_engine"):
        fresh_engine(PI0).infer(random_inputs(PI0), random_noise(PI0))
    assert "new plan ShapePlan(views=(3,), prefix=17" in caplog.text


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'mps', expected 'cpu' or 'cuda'"):
        resolve_device("mps")
    with pytest.raises(ValueError, match="device 'gpu' is not one torch knows"):
        resolve_device("gpu")


def test_cuda_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device is 'cuda', but torch .* sees no CUDA GPU"):
        fresh_engine(PI0, device="cuda")


@pytest.mark.parametrize(
    ("rates", "expected", "said"),
    [
        ((4e11, 2e11, 2e11), torch.bfloat16, "half of float32's memory, and products are not clearly slower"),
        ((1e11, 2e11, 2e11), torch.bfloat16, "half of float32's memory, and products are not clearly slower"),
        ((1e11, 1e11, 2e11), torch.float32, "products of float32 are clearly faster"),
    ],
)
def test_auto_dtype_is_what_was_measured(
    rates: tuple[float, float, float], expected: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = CpuProducts(*rates)
    monkeypatch.setattr(choices, "cpu_products", lambda: products)
    dtype, reason = resolve_dtype("auto", torch.device("cpu"))
    assert dtype == expected
    assert reason == f"{said} here: {products}"
    assert resolve_dtype("auto", torch.device("cuda"))[0] == torch.bfloat16
    assert resolve_dtype("float32", torch.device("cuda")) == (torch.float32, "asked for by name")


def test_products_are_timed_when_the_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the first inference: not even where bfloat16 is asked for by name."""
    timed: list[str] = []
    monkeypatch.setattr(choices, "cpu_products", lambda: timed.append("now"))
    resolve_dtype("float32", torch.device("cpu"))
    resolve_dtype("bfloat16", torch.device("cuda"))
    assert not timed
    assert resolve_dtype("bfloat16", torch.device("cpu")) == (torch.bfloat16, "asked for by name") and timed


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend 'flash_attn' cannot run op 'vision_attention' on cpu: "):
        fresh_engine(PI0, attention="flash_attn")


def test_defaults() -> None:
    running = runtime.Engine(engine(PI0).time_terms._source)
    assert running.engine_config == EngineConfig()
    assert running.ops.choices and running.dtype_reason


def test_sampling_uses_what_was_observed_whatever_ran_meanwhile() -> None:
    """The buffers of the observation stay with it when other shapes push its plan out."""
    running, inputs, noise = fresh_engine(PI0, max_plans=1), random_inputs(PI0), random_noise(PI0)
    expected = running.infer(inputs, noise).actions
    running.observe(inputs)
    running.session(running.plan(views=[1], prompt_lengths=[2]))
    assert torch.equal(running.sample(noise).actions, expected)

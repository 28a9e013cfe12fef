"""Whatever the shapes, masks and sizes: the engine is the reference, and what is absent does not exist. Parity, step 2.

One engine serves all examples, so that its buffers are reused in every order that hypothesis finds.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pi0_engine.config import GemmaConfig, Pi0Config, SiglipConfig
from pi0_engine.inputs import ModelInputs
from tests.support.models import (
    MODEL_TYPES,
    engine,
    fresh_engine,
    random_inputs,
    random_noise,
    reference,
    reference_actions,
    rel_l2,
    rows,
    small_config,
)

TOLERANCE = 2e-5
CONFIGS = [small_config(model_type) for model_type in MODEL_TYPES]


@dataclasses.dataclass(frozen=True)
class Request:
    config: Pi0Config
    inputs: ModelInputs
    noise: Tensor
    num_steps: int

    def actions(self, prompt_bucket: int = 1) -> Tensor:
        running = engine(self.config, prompt_bucket=prompt_bucket)
        return running.infer(self.inputs, self.noise, num_steps=self.num_steps).actions


@st.composite
def requests(draw: st.DrawFn, max_batch: int = 3, max_samples: int = 3, max_horizon: int = 64) -> Request:
    """1 to 4 camera slots with any of them absent, any prompt; an observation has at least one token."""
    config = draw(st.sampled_from(CONFIGS))
    views, batch = draw(st.integers(1, 4)), draw(st.integers(1, max_batch))
    length = draw(st.integers(1, config.token_capacity))
    cameras = draw(st.lists(st.lists(st.booleans(), min_size=views, max_size=views), min_size=batch, max_size=batch))
    lengths = [draw(st.integers(0 if any(mask) else 1, length)) for mask in cameras]
    inputs = random_inputs(config, cameras, lengths, length=length, seed=draw(st.integers(0, 99)))
    samples, horizon = draw(st.integers(1, max_samples)), draw(st.integers(1, max_horizon))
    return Request(config, inputs, random_noise(config, batch, samples, horizon), draw(st.integers(1, 12)))


@settings(max_examples=80)
@given(requests())
def test_engine_is_the_reference(request: Request) -> None:
    expected = reference_actions(reference(request.config), request.inputs, request.noise, request.num_steps)
    assert rel_l2(request.actions(), expected) <= TOLERANCE


@given(requests(max_horizon=8))
def test_what_is_masked_is_never_read(request: Request) -> None:
    """Bit for bit: other pixels in absent cameras, even NaN, and other ids in the padding, even impossible ones."""
    inputs = request.inputs
    absent, padding = ~inputs.image_masks, ~inputs.token_mask
    changed = dataclasses.replace(
        inputs,
        images=np.where(absent[:, :, None, None, None], np.float32(np.nan), inputs.images),
        tokens=np.where(padding, -1, inputs.tokens),
    )
    assert torch.equal(dataclasses.replace(request, inputs=changed).actions(), request.actions())


@given(requests(max_horizon=8))
def test_padding_and_empty_slots_cost_nothing(request: Request) -> None:
    """Longer padding and a further absent camera give the same, bit for bit."""
    inputs, config = request.inputs, request.config
    missing = config.token_capacity - inputs.tokens.shape[1]
    longer = dataclasses.replace(
        inputs,
        tokens=np.pad(inputs.tokens, ((0, 0), (0, missing))),
        token_mask=np.pad(inputs.token_mask, ((0, 0), (0, missing))),
    )
    if inputs.images.shape[1] < 4:
        images = np.concatenate([np.ones_like(inputs.images[:, :1]), inputs.images], axis=1)
        masks = np.pad(inputs.image_masks, ((0, 0), (1, 0)))
        longer = dataclasses.replace(longer, images=images, image_masks=masks)
    assert torch.equal(dataclasses.replace(request, inputs=longer).actions(), request.actions())


@given(requests(max_horizon=8))
def test_a_batch_is_each_observation_alone(request: Request) -> None:
    together = request.actions()
    for b in range(request.inputs.batch):
        alone = dataclasses.replace(request, inputs=rows(request.inputs, b), noise=request.noise[b : b + 1])
        assert rel_l2(together[b : b + 1], alone.actions()) <= TOLERANCE


@given(requests(max_horizon=8))
def test_samples_are_separate_chunks(request: Request) -> None:
    together = request.actions()
    for sample in range(request.noise.shape[1]):
        alone = dataclasses.replace(request, noise=request.noise[:, sample : sample + 1])
        assert rel_l2(together[:, sample : sample + 1], alone.actions()) <= TOLERANCE


@given(requests(max_horizon=8), st.sampled_from([3, 16]))
def test_a_prompt_bucket_changes_nothing(request: Request, bucket: int) -> None:
    assert rel_l2(request.actions(prompt_bucket=bucket), request.actions()) <= TOLERANCE


@given(requests(max_horizon=8))
def test_the_same_request_gives_the_same_bits(request: Request) -> None:
    assert torch.equal(request.actions(), request.actions())


@st.composite
def any_config(draw: st.DrawFn) -> Pi0Config:
    """Small sizes with no relation between them that the model does not ask for."""
    heads, depth = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3) if heads % n == 0]))
    head_dim = draw(st.sampled_from([2, 6, 8, 10, 32]))

    def gemma(width: int, vocab_size: int | None) -> GemmaConfig:
        return GemmaConfig(width, depth, draw(st.integers(1, 70)), heads, kv_heads, head_dim, vocab_size)

    vision_heads = draw(st.integers(1, 3))
    patch, image = draw(st.sampled_from([(14, 28), (14, 56), (14, 14), (7, 21), (4, 20), (14, 224)]))
    return Pi0Config(
        draw(st.sampled_from(MODEL_TYPES)),
        vision=SiglipConfig(
            width=vision_heads * draw(st.integers(1, 9)),
            depth=draw(st.integers(1, 2)),
            num_heads=vision_heads,
            mlp_dim=draw(st.integers(1, 40)),
            patch_size=patch,
            image_size=image,
        ),
        llm=gemma(draw(st.integers(3, 45)), draw(st.integers(2, 50))),
        expert=gemma(2 * draw(st.integers(2, 20)), None),
        action_dim=draw(st.integers(1, 33)),
        max_token_len=6,
        action_horizon=draw(st.integers(1, 9)),
        num_steps=draw(st.integers(1, 4)),
    )


@settings(max_examples=80)
@given(any_config(), st.lists(st.booleans(), min_size=1, max_size=3), st.integers(1, 6))
def test_engine_is_the_reference_at_any_size(config: Pi0Config, cameras: list[bool], prompt: int) -> None:
    inputs, noise = random_inputs(config, [cameras], [prompt]), random_noise(config)
    expected = reference_actions(reference.__wrapped__(config), inputs, noise)
    assert rel_l2(fresh_engine(config).infer(inputs, noise).actions, expected) <= TOLERANCE


@settings(max_examples=10)
@given(requests(max_horizon=16))
@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_stays_near_float32(native: bool, request: Request) -> None:
    """Both ways of multiplying on a CPU. Small widths round worse than the recorded cases, so a loose bound."""
    from pi0_engine.kernels import gemm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "cpu_computes_bfloat16", lambda: native)
        running = engine(request.config, "bfloat16")
        actions = running.infer(request.inputs, request.noise, num_steps=request.num_steps).actions
    assert rel_l2(actions, request.actions()) <= 0.03

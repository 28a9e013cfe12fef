"""The reference as a baseline: it runs on one device, and torch.compile traces it whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from baseline import Baseline
from pi0_engine.checkpoints.parameters import parameter_shapes
from pi0_engine.config import ModelType
from pi0_engine.reference import layers
from pi0_engine.reference.model import Pi0Reference
from tests.support.models import MODEL_TYPES, random_inputs, random_noise, reference, reference_actions, small_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_reference_stays_on_its_device(model_type: ModelType, dtype: torch.dtype) -> None:
    """Fake tensors know their device and refuse to be mixed with those of another, as a GPU's would."""
    config = small_config(model_type)
    shapes = parameter_shapes(config)
    layers.inverse_frequencies.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):

        def elsewhere(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        model = Pi0Reference.from_tensors(config, lambda name: elsewhere(*shapes[name]), dtype)
        size, length, width = config.vision.image_size, config.token_capacity, config.action_dim
        actions = model.sample_actions(
            elsewhere(1, 3, size, size, 3),
            elsewhere(1, 3, dtype=torch.bool),
            elsewhere(1, length, dtype=torch.long),
            elsewhere(1, length, dtype=torch.bool),
            elsewhere(1, width),
            elsewhere(1, config.action_horizon, width),
        )
    layers.inverse_frequencies.cache_clear()
    assert actions.device.type == "meta"
    assert actions.shape == (1, config.action_horizon, width)


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_baseline_computes_the_reference(
    model_type: ModelType, compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "eager" traces as "max-autotune" does, in one graph per piece or with an error, and compiles nothing."""
    # A baseline that compiles replaces it; monkeypatch puts it back.
    monkeypatch.setattr(layers, "inverse_frequencies", layers.inverse_frequencies)
    torch._dynamo.reset()
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [[True, False, True]], [5]), random_noise(config)
    sample = Baseline(reference(config), compiler).prepare(inputs, noise[0], config.num_steps)
    expected = reference_actions(reference(config), inputs, noise)[0]
    assert torch.equal(sample(), expected)
    assert torch.equal(sample(), expected)

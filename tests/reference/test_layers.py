"""The reference's parts against literal numbers, plain formulas, and transformers' own SigLIP and Gemma."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.reference.layers import AdaRMSNorm, RMSNorm, Stream, attention, joint_layer, rope
from pi0_engine.reference.model import Pi0Reference, blockwise_causal, flow_times, sample_training_time, time_embedding
from tests.support.models import MODEL_TYPES, random_inputs, random_noise, reference, rel_l2, small_config, tensors


def close(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-6)


def test_rms_norm_multiplies_by_one_plus_weight() -> None:
    norm = RMSNorm(2)
    norm.weight.data = torch.tensor([1.0, -0.5])
    rms = math.sqrt(12.5 + 1e-6)
    out, gate = norm(torch.tensor([[3.0, 4.0]]))
    close(out, [[3 / rms * 2, 4 / rms * 0.5]])
    assert gate is None


def test_norm_eps_is_1e_6() -> None:
    """Of values around 1e-3 eps is a part of the mean square: 1e-5 instead would halve the result."""
    out, _ = RMSNorm(2)(torch.tensor([[1e-3, -1e-3]]))
    close(out, [[1 / math.sqrt(2), -1 / math.sqrt(2)]])
    layer_norms = [m for m in reference(small_config("pi0")).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in layer_norms} == {1e-6} and len(layer_norms) == 2 * 2 + 1


def test_adarms_takes_scale_shift_gate_in_this_order() -> None:
    norm = AdaRMSNorm(2)
    norm.dense.weight.data.zero_()
    norm.dense.bias.data = torch.tensor([1.0, -0.5, 10.0, 20.0, 0.25, 0.75])
    rms = math.sqrt(12.5 + 1e-6)
    out, gate = norm(torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 2))
    close(out, [[[3 / rms * 2 + 10, 4 / rms * 0.5 + 20]]])
    assert gate is not None
    close(gate, [[[0.25, 0.75]]])


def test_rope_rotates_halves_not_neighbours() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    out = rope(x, torch.tensor([[0, 3]]))
    (c0, s0), (c1, s1) = [(math.cos(a), math.sin(a)) for a in (3.0, 3.0 / 100)]
    close(out[0, 0, 0], [1, 2, 3, 4])
    close(out[0, 0, 1], [1 * c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + 1 * s0, 4 * c1 + 2 * s1])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_softmax_over_allowed_keys(kv_heads: int) -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 6, generator=random)
    k, v = (torch.randn(2, kv_heads, 5, 6, generator=random) for _ in range(2))
    allowed = torch.rand(2, 3, 5, generator=random) > 0.4
    allowed[0, 1] = False  # a padding query: whatever it gives must be finite
    out = attention(q, k, v, allowed)
    assert torch.isfinite(out).all()
    for b in range(2):
        for head in range(4):
            for n in range(3):
                keys = allowed[b, n].nonzero()[:, 0]
                if len(keys) == 0:
                    continue
                shared = head * kv_heads // 4
                weights = (k[b, shared, keys].double() @ q[b, head, n].double() / math.sqrt(6)).softmax(0)
                close(out[b, n, head * 6 : head * 6 + 6], (weights @ v[b, shared, keys].double()).float())


def test_blockwise_causal_mask() -> None:
    """Two prompt tokens (one of them padding), the state, two actions."""
    pad_mask = torch.tensor([[True, False, True, True, True]])
    starts = torch.tensor([False, False, True, True, False])
    assert blockwise_causal(pad_mask, starts)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 1],
        [1, 0, 1, 1, 1],
    ]


def test_flow_times_are_accumulated_in_float32() -> None:
    """openpi's recorded times of ten steps: not 1 - i / 10."""
    recorded = [1, 0.89999998, 0.79999995, 0.69999993, 0.5999999, 0.49999991, 0.39999992, 0.29999992, 0.19999993]
    times = [time for time, _ in flow_times(10)]
    assert torch.equal(torch.stack(times), torch.tensor([*recorded, 0.09999993]))
    assert [float(dt) for _, dt in flow_times(10)] == [float(torch.tensor(-0.1))] * 10


def test_time_embedding_is_exact_at_the_shortest_period() -> None:
    """Angles up to 2 pi / 4e-3 = 1571 rad: in float32 alone the sine would be off by 1e-4."""
    time = torch.tensor([0.89999998, 1.0])
    periods = [4e-3, 4e-3 * 1000 ** (1 / 2), 4.0]
    angles = [[2 * math.pi * float(t) / p for p in periods] for t in time]
    close(time_embedding(time, 6), [[*map(math.sin, row), *map(math.cos, row)] for row in angles])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_joint_pass_gives_the_velocity_of_the_cached_pass(model_type: ModelType) -> None:
    """With a masked camera in the middle, different prompt lengths, and a time of its own per observation."""
    config = small_config(model_type)
    model, noise = reference(config), random_noise(config, 2)[:, 0]
    i = tensors(random_inputs(config, [[True, False, True], [True, True, True]], [5, 0]))
    prefix, pad_mask = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
    time = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        cached = model.velocity(i.state, pad_mask, model.prefill(prefix, pad_mask), noise, time)
        joint = model.joint_velocity(prefix, pad_mask, i.state, noise, time)
    assert rel_l2(joint, cached) <= 1e-6


def loss_setup(model_type: ModelType) -> tuple[Pi0Reference, tuple[Tensor, Tensor, Tensor], Tensor]:
    """A model of its own, (prefix, prefix_pad, state), noise [2, H, A]."""
    config = small_config(model_type)
    model = Pi0Reference.from_tensors(config, RandomCheckpoint(config).tensor)
    i = tensors(random_inputs(config, [[True, True, False]] * 2, [4, 7]))
    prefix, pad_mask = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
    return model, (prefix, pad_mask, i.state), random_noise(config, 2)[:, 0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loss_is_zero_where_the_velocity_is_right(model_type: ModelType) -> None:
    """At t = 1 the model sees the noise, at t = 0 the actions; either way the answer is noise - actions."""
    model, context, noise = loss_setup(model_type)
    ones, zeros = torch.ones(2), torch.zeros(2)
    actions = noise - model.joint_velocity(*context, noise, ones)
    assert model.loss(*context, actions, noise, ones).max() <= 1e-10
    other_noise = noise + model.joint_velocity(*context, noise, zeros)
    assert model.loss(*context, noise, other_noise, zeros).max() <= 1e-10
    assert model.loss(*context, actions, noise, ones / 2).min() > 1e-4  # elsewhere it is not


def test_loss_of_a_constant_velocity() -> None:
    model, context, noise = loss_setup("pi0")
    model.action_out_proj.weight.data.zero_()
    velocity, actions = model.action_out_proj.bias, noise.flip(0)
    expected = (velocity - (noise - actions)).square().mean(dim=-1)
    torch.testing.assert_close(model.loss(*context, actions, noise, torch.tensor([0.2, 0.7])), expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_what_sampling_never_reads_has_no_gradient(model_type: ModelType) -> None:
    """The prefix's output is not used, so its last layer ends at keys and values."""
    model, (_, pad_mask, state), noise = loss_setup(model_type)
    config = model.config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    i = tensors(random_inputs(config, [[True, True, False]] * 2, [4, 7]))
    prefix, _ = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
    loss = model.loss(prefix, pad_mask, state, noise.flip(0), noise, torch.tensor([0.2, 0.7])).mean()
    loss.backward()
    untouched = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    last = f"llm.layers.{config.llm.depth - 1}"
    parts = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "post_attention_norm")
    # A bias in front of the keys adds the same to every logit of a query: softmax does not see it.
    keys = {f"vision.layers.{n}.k_proj.bias" for n in range(config.vision.depth)}
    expected = {"llm.norm.weight", *(f"{last}.{part}.weight" for part in parts)}
    assert untouched - keys == expected - keys


def test_training_times_follow_beta() -> None:
    """Beta(1.5, 1) has mean 0.6 and P(t <= 0.5) = 0.5^1.5; squeezed into (0.001, 1)."""
    times = sample_training_time(100_000, torch.Generator().manual_seed(0))
    assert times.dtype == torch.float32 and times.min() > 0.001 and times.max() <= 1
    assert float(times.mean()) == pytest.approx(0.6 * 0.999 + 0.001, abs=3e-3)
    assert float((times <= 0.5 * 0.999 + 0.001).float().mean()) == pytest.approx(0.5**1.5, abs=5e-3)


def test_wrong_dtype_and_misshapen_tensor_are_refused() -> None:
    config = small_config("pi0")
    with pytest.raises(ValueError, match=r"dtype is torch\.float16, expected torch\.float32 or torch\.bfloat16"):
        Pi0Reference(config, torch.float16)
    with pytest.raises(ValueError, match=r"has shape \[1\], expected"):
        Pi0Reference.from_tensors(config, lambda name: torch.zeros(1))


def test_vision_tower_is_transformers_siglip() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    c = small_config("pi0").vision
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=c.width,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            intermediate_size=c.mlp_dim,
            image_size=c.image_size,
            patch_size=c.patch_size,
            vision_use_head=False,
        )
    ).eval()
    ours = reference(small_config("pi0")).vision
    renamed = {
        "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding",
        "post_norm": "post_layernorm",
        "layers": "encoder.layers",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        **{name: f"mlp.{name}" for name in ("fc1", "fc2")},
    }
    weights = {".".join(renamed.get(part, part) for part in n.split(".")): p.data for n, p in ours.named_parameters()}
    prefix = "vision_model." if any(n.startswith("vision_model.") for n, _ in theirs.named_parameters()) else ""
    theirs.load_state_dict({prefix + name: value for name, value in weights.items()})
    images = tensors(random_inputs(small_config("pi0"))).images[0].permute(0, 3, 1, 2)
    with torch.no_grad():
        assert rel_l2(ours(images), theirs(pixel_values=images).last_hidden_state) <= 1e-6


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_decoder_layers_are_transformers_gemma(kv_heads: int) -> None:
    """Every layer of both towers, full attention over valid tokens, positions that skip the others."""
    from transformers.models.gemma.configuration_gemma import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRotaryEmbedding

    model = reference(with_kv_heads(small_config("pi0"), kv_heads))
    for name, c in (("llm", model.config.llm), ("expert", model.config.expert)):
        hf = GemmaConfig(
            vocab_size=8,
            hidden_size=c.width,
            intermediate_size=c.mlp_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
        )
        hf._attn_implementation = "eager"
        x = torch.randn(2, 9, c.width, generator=torch.Generator().manual_seed(3))
        valid = torch.tensor([[True] * 9, [True] * 3 + [False] * 4 + [True] * 2])
        positions, allowed = valid.long().cumsum(1) - 1, blockwise_causal(valid, torch.zeros(9, dtype=torch.bool))
        mask = torch.zeros(2, 1, 9, 9).masked_fill(~allowed[:, None], -1e30)
        rotation = GemmaRotaryEmbedding(hf)(x, positions)
        stream, y = Stream(getattr(model, name), x), x
        for index, layer in enumerate(getattr(model, name).layers):
            theirs = GemmaDecoderLayer(hf, index).eval()
            theirs.load_state_dict({gemma_name(n): p.data for n, p in layer.named_parameters()})
            with torch.no_grad():
                joint_layer(index, [stream], positions, allowed, None)
                out = theirs(y, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
                y = out if isinstance(out, Tensor) else out[0]  # a tuple before transformers 4.54
            assert rel_l2(stream.x[valid], y[valid]) <= 2e-6, f"{name} layer {index}"


def gemma_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module.endswith("norm"):
        return f"{module.removesuffix('norm')}layernorm.{leaf}"
    return f"{'self_attn' if module[0] in 'qkvo' else 'mlp'}.{module}.{leaf}"


def with_kv_heads(config: Pi0Config, kv_heads: int) -> Pi0Config:
    towers = {name: dataclasses.replace(getattr(config, name), num_kv_heads=kv_heads) for name in ("llm", "expert")}
    return dataclasses.replace(config, **towers)

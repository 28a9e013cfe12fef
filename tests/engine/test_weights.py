"""Packing: what is folded, what is left out, and that nothing of the source is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pi0_engine.checkpoints.parameters import parameter_shapes
from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.weights import Weights, pack_weights
from tests.support.models import MODEL_TYPES, rel_l2, small_config

CPU = torch.device("cpu")


class Source:
    """A checkpoint that remembers what was read and gives the same tensor objects every time."""

    def __init__(self, config: Pi0Config) -> None:
        self.config = config
        self.tensors = {name: RandomCheckpoint(config).tensor(name) for name in parameter_shapes(config)}
        self.read: list[str] = []

    def tensor(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name]


def packed(model_type: ModelType, dtype: torch.dtype = torch.float32) -> tuple[Source, Weights]:
    source = Source(small_config(model_type))
    return source, pack_weights(source, dtype, CPU)


def test_layernorm_is_folded_into_the_linears_behind_it() -> None:
    source, weights = packed("pi0")
    t, x = source.tensors, torch.randn(5, 36, generator=torch.Generator().manual_seed(0))
    normed = torch.nn.functional.layer_norm(x, (36,), eps=1e-6)
    layer = weights.vision.layers[1]
    for norm, linears, weight, bias in (
        ("vision.layers.1.norm1", ["q_proj", "k_proj", "v_proj"], layer.qkv, layer.qkv_bias),
        ("vision.layers.1.norm2", ["fc1"], layer.fc1, layer.fc1_bias),
    ):
        scaled = normed * t[f"{norm}.weight"] + t[f"{norm}.bias"]
        names = [f"vision.layers.1.{name}" for name in linears]
        expected = torch.cat([scaled @ t[f"{n}.weight"].T + t[f"{n}.bias"] for n in names], dim=1)
        assert rel_l2(normed @ weight.T + bias, expected) <= 1e-6
    scaled = normed * t["vision.post_norm.weight"] + t["vision.post_norm.bias"]
    expected = scaled @ t["projector.weight"].T + t["projector.bias"]
    assert rel_l2(normed @ weights.vision.projector.T + weights.vision.projector_bias, expected) <= 1e-6


def test_rows_behind_a_layernorm_have_mean_0() -> None:
    """So that they do not see the mean of what they multiply: W diag(w), less each row's mean, rounded once."""
    source, weights = packed("pi0")
    _, rounded = packed("pi0", torch.bfloat16)
    t, vision = source.tensors, weights.vision
    for norm, names, weight, again in (
        (
            "vision.layers.1.norm1",
            [f"vision.layers.1.{p}_proj" for p in "qkv"],
            vision.layers[1].qkv,
            rounded.vision.layers[1].qkv,
        ),
        ("vision.layers.1.norm2", ["vision.layers.1.fc1"], vision.layers[1].fc1, rounded.vision.layers[1].fc1),
        ("vision.post_norm", ["projector"], vision.projector, rounded.vision.projector),
    ):
        scaled = torch.cat([t[f"{name}.weight"].double() * t[f"{norm}.weight"].double() for name in names])
        assert float(scaled.mean(dim=1).norm()) > 0.01, "otherwise there is nothing to see"
        assert rel_l2(weight, scaled - scaled.mean(dim=1, keepdim=True)) <= 1e-6
        assert float(weight.double().mean(dim=1).abs().max()) <= 1e-7
        assert torch.equal(again, weight.bfloat16())
        # A constant added to a row of x changes nothing but for what is left of the mean: each weight is rounded once,
        # and so is each row's mean. Of weights that are not centred it changes a thousand times as much.
        x = torch.randn(5, scaled.shape[1], generator=torch.Generator().manual_seed(0)).double()
        left = 100 * 2 * 2.0**-24 * weight.double().abs().sum(dim=1)
        shifted, plain = (x + 100) @ weight.double().T, x @ weight.double().T
        assert bool(((shifted - plain).abs() <= left).all())
        assert bool((((x + 100) @ scaled.T - x @ scaled.T).abs() > 1000 * left).any())


def test_gemma_norms_are_folded_with_one_plus_weight() -> None:
    source, weights = packed("pi0")
    for tower, layers in (("llm", weights.llm), ("expert", weights.expert)):
        t, prefix = source.tensors, f"{tower}.layers.1"
        scale = 1 + t[f"{prefix}.input_norm.weight"]
        expected = torch.cat([t[f"{prefix}.{p}_proj.weight"] * scale for p in "qkv"])
        assert torch.equal(layers[1].qkv, expected)
        scale = 1 + t[f"{prefix}.post_attention_norm.weight"]
        expected = torch.cat([t[f"{prefix}.{p}_proj.weight"] * scale for p in ("gate", "up")])
        gate_up, o, down = layers[1].gate_up, layers[1].o, layers[1].down
        assert gate_up is not None and o is not None and down is not None
        assert torch.equal(gate_up, expected)
        assert torch.equal(o, t[f"{prefix}.o_proj.weight"]) and torch.equal(down, t[f"{prefix}.down_proj.weight"])


def test_adarms_leaves_the_experts_linears_as_they_are() -> None:
    source, weights = packed("pi05")
    expected = torch.cat([source.tensors[f"expert.layers.0.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(weights.expert[0].qkv, expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_last_language_layer_has_only_keys_and_values(model_type: ModelType) -> None:
    source, weights = packed(model_type)
    last = weights.llm[-1]
    assert (last.o, last.gate_up, last.down) == (None, None, None)
    assert last.qkv.shape == (2 * 16, 40)
    unread = set(parameter_shapes(source.config)) - set(source.read)
    for part in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "post_attention_norm"):
        assert f"llm.layers.2.{part}.weight" in unread
    assert weights.expert[-1].o is not None


def test_action_projection_is_folded_into_the_mlp() -> None:
    source, weights = packed("pi0")
    t = source.tensors
    expected = t["action_time_mlp_in.weight"][:, :28].double() @ t["action_in_proj.weight"].double()
    assert rel_l2(weights.action.embed, expected) <= 1e-7
    _, pi05 = packed("pi05")
    assert (pi05.action.mlp_out, pi05.action.state) == (None, None)


def test_patch_weights_are_float32_with_the_channel_fastest() -> None:
    source, weights = packed("pi0", torch.bfloat16)
    t, vision = source.tensors, weights.vision
    assert vision.patch.dtype == vision.position.dtype == torch.float32
    assert torch.equal(vision.patch.view(36, 14, 14, 3), t["vision.patch_embedding.weight"].permute(0, 2, 3, 1))
    assert torch.equal(vision.position, t["vision.position_embedding.weight"] + t["vision.patch_embedding.bias"])


def test_folding_rounds_once() -> None:
    """bfloat16 weights are the float32 product rounded, not a product of rounded ones."""
    _, exact = packed("pi0")
    _, rounded = packed("pi0", torch.bfloat16)
    assert torch.equal(rounded.llm[0].qkv, exact.llm[0].qkv.bfloat16())
    assert torch.equal(rounded.vision.layers[0].fc1, exact.vision.layers[0].fc1.bfloat16())
    assert rounded.vision.layers[0].fc1_bias.dtype == torch.float32


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_weights_own_their_memory(model_type: ModelType) -> None:
    """A checkpoint is a memory map of a file that may go away; only the embedding table stays mapped."""
    source, weights = packed(model_type)
    table = source.tensors["llm.embed_tokens.weight"]
    assert weights.embed_tokens is table
    theirs = {t.untyped_storage().data_ptr() for t in source.tensors.values()}
    layers = [v for layer in [*weights.llm, *weights.expert] for v in vars(layer).values()]
    vision = [v for layer in weights.vision.layers for v in vars(layer).values()]
    ends = [v for part in (weights.vision, weights.action) for v in vars(part).values()]
    tensors = [v for v in [*layers, *vision, *ends] if isinstance(v, Tensor)]
    assert not theirs & {t.untyped_storage().data_ptr() for t in tensors}
    assert weights.packed_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert all(t.is_contiguous() for t in tensors)


def test_an_unreadable_tensor_stops_packing_with_its_own_error() -> None:
    source = Source(small_config("pi0"))
    original = source.tensor

    def damaged(name: str) -> Tensor:
        if name == "llm.layers.1.k_proj.weight":
            raise ValueError(f"{name}: data is damaged")
        return original(name)

    source.tensor = damaged  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"llm\.layers\.1\.k_proj\.weight: data is damaged"):
        pack_weights(source, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_folded_in_float32_whatever_the_checkpoint_is_stored_in(dtype: torch.dtype) -> None:
    """A bfloat16 checkpoint multiplied in bfloat16 would be rounded once more per norm than openpi does it."""
    config = small_config("pi0")
    source = Source(config)
    source.tensors = {name: tensor.to(torch.bfloat16) for name, tensor in source.tensors.items()}
    weights, t = pack_weights(source, dtype, CPU), {name: tensor.double() for name, tensor in source.tensors.items()}
    layer, vision = weights.llm[0], weights.vision.layers[0]
    qkv = torch.cat([t[f"llm.layers.0.{p}_proj.weight"] for p in "qkv"]) * (1 + t["llm.layers.0.input_norm.weight"])
    gate_up = torch.cat([t[f"llm.layers.0.{p}_proj.weight"] for p in ("gate", "up")])
    gate_up = gate_up * (1 + t["llm.layers.0.post_attention_norm.weight"])
    names = [f"vision.layers.0.{p}_proj" for p in "qkv"]
    scaled = torch.cat([t[f"{name}.weight"] for name in names]) * t["vision.layers.0.norm1.weight"]
    scaled = scaled - scaled.mean(dim=1, keepdim=True)
    bias = torch.cat([t[f"{n}.bias"] + t[f"{n}.weight"] @ t["vision.layers.0.norm1.bias"] for n in names])
    # 1 + w and the product are rounded in float32, and what they give to the packed dtype, by half its spacing at most.
    unit = 2.0**-24
    one_rounding = {torch.float32: 3 * unit, torch.bfloat16: 2.0**-8 + 3 * unit}[dtype]
    for found, expected in ((layer.qkv, qkv), (layer.gate_up, gate_up)):
        assert found is not None
        assert ((found.double() - expected).abs() <= one_rounding * expected.abs()).all()
    # A sum of n numbers is off by n units of their sizes, whatever its order: the row's mean, and the bias' product.
    n = scaled.shape[1]
    largest = (scaled.abs() + scaled.abs().amax(dim=1, keepdim=True)).double()
    assert ((vision.qkv.double() - scaled).abs() <= one_rounding * scaled.abs() + (n + 3) * unit * largest).all()
    sizes = [t[f"{i}.bias"].abs() + t[f"{i}.weight"].abs() @ t["vision.layers.0.norm1.bias"].abs() for i in names]
    assert ((vision.qkv_bias.double() - bias).abs() <= (n + 2) * unit * torch.cat(sizes)).all()
    assert vision.qkv_bias.dtype == torch.float32

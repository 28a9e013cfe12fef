"""What depends on the flow time alone, against the reference's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.solvers import flow_grid
from pi0_engine.engine.time_terms import Modulation, StepTerms, TimeTerms, time_embedding
from pi0_engine.engine.weights import TensorSource, pack_weights
from pi0_engine.reference.model import flow_times
from pi0_engine.reference.model import time_embedding as reference_time_embedding
from tests.support.models import MODEL_TYPES, fresh_engine, reference, rel_l2, small_config

CPU = torch.device("cpu")


def terms_of(model_type: ModelType, num_steps: int) -> tuple[Pi0Config, tuple[StepTerms, ...]]:
    config = small_config(model_type)
    return config, time_terms(RandomCheckpoint(config))(num_steps)


def time_terms(source: TensorSource, dtype: torch.dtype = torch.float32) -> TimeTerms:
    """With the expert's layers as the engine packs them."""
    return TimeTerms(source, pack_weights(RandomCheckpoint(source.config), dtype, CPU).expert, CPU)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 37, 2000])
def test_the_grid_is_the_references(num_steps: int) -> None:
    times, dt = flow_grid(num_steps)
    assert times == [float(time) for time, _ in flow_times(num_steps)]
    assert {dt} == {float(dt) for _, dt in flow_times(num_steps)}
    assert times[0] == 1.0 and times[-1] == pytest.approx(1 / num_steps, abs=2e-5)


def test_the_grid_of_ten_steps() -> None:
    """openpi's recorded times: accumulated in float32, the last is not 0.1."""
    times, _ = flow_grid(10)
    assert (
        torch.tensor(times[1:4] + times[-1:]).tolist()
        == torch.tensor([0.89999998, 0.79999995, 0.69999993, 0.09999993]).tolist()
    )


def test_the_grid_of_ten_steps_as_lerobot_rounds_it() -> None:
    times, dt = flow_grid(10, "lerobot")
    assert times == torch.linspace(1.0, 0.1, 10, dtype=torch.float64).float().tolist()
    assert (times[-1], dt) == (float(torch.tensor(0.1)), flow_grid(10)[1])
    assert times != flow_grid(10)[0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_engine_follows_the_rounding_that_it_is_told(model_type: ModelType) -> None:
    engine = fresh_engine(small_config(model_type), flow_times="lerobot")
    assert [step.time for step in engine.time_terms(10)] == flow_grid(10, "lerobot")[0]


def test_time_embedding_is_the_references() -> None:
    times = flow_grid(10)[0]
    assert torch.equal(time_embedding(times, 28), reference_time_embedding(torch.tensor(times), 28))


def test_pi0_bias_carries_the_time() -> None:
    config, steps = terms_of("pi0", 3)
    model, x_t = reference(config), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for terms, (time, _) in zip(steps, flow_times(3), strict=True):
        time_emb = reference_time_embedding(time.expand(1), config.expert.width).expand(5, -1)
        expected = model.action_time_mlp_in(torch.cat([model.action_in_proj(x_t), time_emb], dim=-1))
        folded = model.action_time_mlp_in.weight[:, : config.expert.width] @ model.action_in_proj.weight
        assert rel_l2(x_t @ folded.T + terms.embed_bias, expected) <= 1e-6
        assert terms.input_norms == terms.mlp_norms == (Modulation(),) * 3
        assert [terms.scale_after_layer(n) for n in range(3)] == [None] * 3


def adarms(norm: str, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's raw scale, shift and gate of a norm of π0.5's expert at that flow time."""
    model = reference(small_config("pi05"))
    _, cond = model.embed_suffix(torch.zeros(1, 7), torch.zeros(1, 5, 7), time.expand(1))
    scale, shift, gate = model.get_submodule(norm).dense(cond)[0].chunk(3)  # type: ignore[operator]
    return scale, shift, gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pi05_modulations_are_adarms(dtype: torch.dtype) -> None:
    """``scale`` is 1 + the raw one, the gate is raw, and the shift is behind the packed weight it would meet."""
    config = small_config("pi05")
    layers = pack_weights(RandomCheckpoint(config), dtype, CPU).expert
    steps = TimeTerms(RandomCheckpoint(config), layers, CPU)(3)
    for terms, (time, _) in zip(steps, flow_times(3), strict=True):
        for n, layer in enumerate(layers):
            for norm, modulation, weight in (
                ("input_norm", terms.input_norms[n], layer.qkv),
                ("post_attention_norm", terms.mlp_norms[n], layer.gate_up),
            ):
                scale, shift, gate = adarms(f"expert.layers.{n}.{norm}", time)
                assert weight is not None and weight.dtype == dtype
                behind = weight.double() @ shift.double()
                for ours, expected in (
                    (modulation.scale, 1 + scale),
                    (modulation.gate, gate),
                    (modulation.bias, behind),
                ):
                    assert ours is not None and ours.is_contiguous()
                    assert rel_l2(ours, expected) <= 1e-6, f"{n} {norm}"
        assert torch.equal(terms.embed_bias, reference(config).action_in_proj.bias)


def test_tables_hold_the_steps_time_and_time_0() -> None:
    """Tokens with times of their own: everything else of a step stays."""
    config = small_config("pi05")
    make = time_terms(RandomCheckpoint(config))
    plain, tables = make(3), make(3, per_token=True)
    assert tables is make(3, per_token=True) and plain is make(3)
    for one, both in zip(plain, tables, strict=True):
        assert (one.time, one.dt) == (both.time, both.dt)
        assert torch.equal(one.out, both.out) and torch.equal(one.out_bias, both.out_bias)
        for n in range(3):
            for norm, step, table in (
                ("input_norm", one.input_norms[n], both.input_norms[n]),
                ("post_attention_norm", one.mlp_norms[n], both.mlp_norms[n]),
            ):
                scale, _, gate = adarms(f"expert.layers.{n}.{norm}", torch.tensor(0.0))
                for mine, first, clean in (
                    (table.scale, step.scale, 1 + scale),
                    (table.gate, step.gate, gate),
                    (table.bias, step.bias, None),
                ):
                    assert mine is not None and first is not None and mine.is_contiguous()
                    assert mine.shape == (2, *first.shape) and rel_l2(mine[0], first) <= 1e-6
                    assert clean is None or rel_l2(mine[1], clean) <= 1e-6
    # The shift of time 0, behind the weight: the reference's own.
    layers = pack_weights(RandomCheckpoint(config), torch.float32, CPU).expert
    _, shift, _ = adarms("expert.layers.1.input_norm", torch.tensor(0.0))
    bias = tables[0].input_norms[1].bias
    assert bias is not None and rel_l2(bias[1], layers[1].qkv.double() @ shift.double()) <= 1e-6


@pytest.mark.parametrize("rows", [1, 40, 96, 1000])
def test_the_shift_meets_the_weight_a_few_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = terms_of("pi05", 2)
    monkeypatch.setattr("pi0_engine.engine.time_terms._ROWS", rows)
    for ours, theirs in zip(terms_of("pi05", 2)[1], expected, strict=True):
        for a, b in zip(ours.input_norms + ours.mlp_norms, theirs.input_norms + theirs.mlp_norms, strict=True):
            assert a.bias is not None and b.bias is not None
            torch.testing.assert_close(a.bias, b.bias)


def test_the_scale_after_a_layer_is_the_next_ones() -> None:
    """Behind the last comes the final norm, whose scale is in the output projection."""
    for terms in terms_of("pi05", 2)[1]:
        assert terms.scale_after_layer(0) is terms.input_norms[1].scale is not None
        assert terms.scale_after_layer(1) is terms.input_norms[2].scale is not None
        assert terms.scale_after_layer(2) is None


def test_pi0_folds_step_size_and_final_norm_into_the_output() -> None:
    config, steps = terms_of("pi0", 4)
    model, dt = reference(config), -0.25
    for terms in steps:
        assert (
            rel_l2(terms.out, model.action_out_proj.weight * (1 + model.get_parameter("expert.norm.weight")) * dt)
            <= 1e-6
        )
        assert rel_l2(terms.out_bias, model.action_out_proj.bias * dt) <= 1e-6


def test_pi05_folds_the_final_adarms_too() -> None:
    """dt * (out @ (normed * (1 + scale) + shift) + bias), for any normed row; the final norm's gate is not used."""
    config, steps = terms_of("pi05", 4)
    model, dt = reference(config), -0.25
    weight, bias = model.action_out_proj.weight.double(), model.action_out_proj.bias.double()
    normed = torch.randn(5, 28, generator=torch.Generator().manual_seed(0)).double()
    for terms, (time, _) in zip(steps, flow_times(4), strict=True):
        scale, shift, _ = (part.double() for part in adarms("expert.norm", time))
        assert rel_l2(terms.out, weight * (1 + scale) * dt) <= 1e-6
        assert rel_l2(terms.out_bias, (weight @ shift + bias) * dt) <= 1e-6
        expected = dt * ((normed * (1 + scale) + shift) @ weight.T + bias)
        assert rel_l2(normed @ terms.out.double().T + terms.out_bias.double(), expected) <= 1e-6


def test_a_few_step_counts_are_kept() -> None:
    class Counting:
        def __init__(self) -> None:
            self.config, self.reads = small_config("pi05"), 0

        def tensor(self, name: str) -> Tensor:
            self.reads += 1
            return RandomCheckpoint(self.config).tensor(name)

    source = Counting()
    make = time_terms(source)
    first = make(1)
    reads = source.reads
    assert make(1) is first and source.reads == reads
    for num_steps in (2, 3, 4):
        make(num_steps)
    assert make(1) is first  # used again: the newest now
    make(5)  # so that 2 goes
    reads = source.reads
    assert make(1) is first and len(make(3)) == 3 and source.reads == reads
    make(2)
    assert source.reads > reads


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_terms_are_float32_whatever_checkpoint_and_engine_are(model_type: ModelType) -> None:
    config = small_config(model_type)
    source = RandomCheckpoint(config, dtype=torch.bfloat16)
    for terms in TimeTerms(source, pack_weights(source, torch.bfloat16, CPU).expert, CPU)(2):
        tensors = [terms.embed_bias, terms.out, terms.out_bias]
        norms = (*terms.input_norms, *terms.mlp_norms)
        tensors += [t for m in norms for t in vars(m).values() if t is not None]
        assert {t.dtype for t in tensors} == {torch.float32}
        assert all(t.is_contiguous() for t in tensors)

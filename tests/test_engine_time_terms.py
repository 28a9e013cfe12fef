"""What depends on the flow time alone, against the reference's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import MODEL_TYPES, reference, rel_l2, small_config
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.time_terms import Modulation, StepTerms, TimeTerms, flow_grid, time_embedding
from pi0_engine.random_weights import RandomCheckpoint
from pi0_engine.reference import flow_times
from pi0_engine.reference import time_embedding as reference_time_embedding

CPU = torch.device("cpu")


def terms_of(model_type: ModelType, num_steps: int) -> tuple[Pi0Config, tuple[StepTerms, ...]]:
    config = small_config(model_type)
    return config, TimeTerms(RandomCheckpoint(config), CPU)(num_steps)


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
        assert terms.final_norm == Modulation()


def test_pi05_modulations_are_adarms() -> None:
    """``scale`` is 1 + the raw one; shift and gate are raw."""
    config, steps = terms_of("pi05", 3)
    model = reference(config)
    for terms, (time, _) in zip(steps, flow_times(3), strict=True):
        _, cond = model.embed_suffix(torch.zeros(1, 7), torch.zeros(1, 5, 7), time.expand(1))
        layers = [(f"expert.layers.{n}.input_norm", m) for n, m in enumerate(terms.input_norms)]
        layers += [(f"expert.layers.{n}.post_attention_norm", m) for n, m in enumerate(terms.mlp_norms)]
        for name, modulation in [*layers, ("expert.norm", terms.final_norm)]:
            scale, shift, gate = model.get_submodule(name).dense(cond)[0].chunk(3)  # type: ignore[operator]
            for ours, expected in ((modulation.scale, 1 + scale), (modulation.shift, shift), (modulation.gate, gate)):
                assert ours is not None
                assert rel_l2(ours, expected) <= 1e-6, name
        assert torch.equal(terms.embed_bias, model.action_in_proj.bias)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_step_size_and_final_norm_are_folded_into_the_output(model_type: ModelType) -> None:
    config, steps = terms_of(model_type, 4)
    model, dt = reference(config), -0.25
    scale = 1 + model.get_parameter("expert.norm.weight") if model_type == "pi0" else torch.ones(28)
    for terms in steps:
        assert rel_l2(terms.out, model.action_out_proj.weight * scale * dt) <= 1e-6
        assert rel_l2(terms.out_bias, model.action_out_proj.bias * dt) <= 1e-6


def test_a_few_step_counts_are_kept() -> None:
    class Counting:
        def __init__(self) -> None:
            self.config, self.reads = small_config("pi05"), 0

        def tensor(self, name: str) -> Tensor:
            self.reads += 1
            return RandomCheckpoint(self.config).tensor(name)

    source = Counting()
    make = TimeTerms(source, CPU)
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
def test_terms_are_float32_whatever_the_checkpoint_is(model_type: ModelType) -> None:
    config = small_config(model_type)
    for terms in TimeTerms(RandomCheckpoint(config, dtype=torch.bfloat16), CPU)(2):
        tensors = [terms.embed_bias, terms.out, terms.out_bias]
        tensors += [t for m in (*terms.input_norms, terms.final_norm) for t in vars(m).values() if t is not None]
        assert {t.dtype for t in tensors} == {torch.float32}

"""The reference against what openpi recorded: every stage, every flow step, the actions. Parity, step 1."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import Pi0Config
from pi0_engine.reference.model import (
    Pi0Reference,
    flow_times,
    keeps_full_values,
    prefix_positions,
    storage_dtype,
    time_embedding,
)
from tests.support import golden
from tests.support.models import Recorder, reference, reference_actions, rel_l2, tensors

#: The contract: what still tells a structural mistake from rounding (openpi's own JAX model is off by up to 9e-6).
CONTRACT = 2e-5
#: What is measured is 3e-7 to 1e-6. A change that lands between the two is no rounding of ours and has to be explained.
REGRESSION = 3e-6


def actions_of(model: Pi0Reference, case: str) -> Tensor:
    loaded = golden.load(case)
    return reference_actions(model, loaded.inputs, loaded.noise[:, None], loaded.num_steps)[:, 0]


@functools.cache
def velocities_and_actions(case: str) -> tuple[list[Tensor], Tensor]:
    """The reference's own trajectory through the steps of ``sample_actions``."""
    loaded, model = golden.load(case), reference(golden.config_of(case))
    i, x_t, velocities = tensors(loaded.inputs), loaded.noise, []
    with torch.no_grad():
        prefix, pad_mask = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
        cache = model.prefill(prefix, pad_mask)
        for time, dt in flow_times(loaded.num_steps):
            velocities.append(model.velocity(i.state, pad_mask, cache, x_t, time.expand(len(x_t))))
            x_t = x_t + dt * velocities[-1]
    return velocities, x_t


@pytest.mark.parametrize("case", golden.TINY)
def test_actions_are_openpis(case: str) -> None:
    _, actions = velocities_and_actions(case)
    error = rel_l2(actions, golden.expected(case))
    assert error <= CONTRACT
    assert error <= REGRESSION


@pytest.mark.parametrize("case", golden.TINY)
def test_velocity_of_every_step_is_openpis(case: str) -> None:
    velocities, _ = velocities_and_actions(case)
    errors = [
        rel_l2(ours, theirs) for ours, theirs in zip(velocities, golden.expected(case, "velocities"), strict=True)
    ]
    assert max(errors) <= REGRESSION, errors


def test_sample_actions_takes_these_steps() -> None:
    case = "pi05_tiny_p02_prompt5_steps5"
    assert torch.equal(actions_of(reference(golden.config_of(case)), case), velocities_and_actions(case)[1])


def test_actions_are_those_of_openpis_jax_model() -> None:
    _, actions = velocities_and_actions("pi0_tiny_c00_base")
    assert rel_l2(actions, golden.expected("pi0_tiny_c00_base", "actions__jax_float32")) <= CONTRACT


@functools.cache
def recorded_stages(case: str) -> dict[str, Tensor]:
    """The reference's tensors under the names of openpi's recorded ones (:func:`golden.stages`)."""
    loaded, config = golden.load(case), golden.config_of(case)
    model, i, depth = reference(config), tensors(loaded.inputs), config.llm.depth
    rows = golden.stages(case)["prefix_rows"].long()
    with Recorder(model) as seen, torch.no_grad():
        prefix, pad_mask = model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask)
        cache = model.prefill(prefix, pad_mask)
        x_t, steps, times = loaded.noise, [], []
        for time, dt in flow_times(loaded.num_steps):
            steps.append(x_t)
            times.append(time)
            x_t = x_t + dt * model.velocity(i.state, pad_mask, cache, x_t, time.expand(1))
        _, cond = model.embed_suffix(i.state, loaded.noise, times[0].expand(1))
        last = f"llm.layers.{depth - 1}"
        prefix_out = seen.inputs[f"{last}.post_attention_norm"][0] + seen.outputs[f"{last}.down_proj"][0]
        normed, _ = model.llm.norm(prefix_out)
    first_camera, every_sixth = slice(0, 1), slice(None, None, 6)
    vision = {
        "cam0_patch_pos_emb": seen.inputs["vision.layers.0"],
        "cam0_vit_post_ln": seen.outputs["vision.post_norm"],
    }
    vision |= {f"cam0_vit_layer{n}": seen.outputs[f"vision.layers.{n}"] for n in range(config.vision.depth)}
    out = {name: calls[0][first_camera, every_sixth] for name, calls in vision.items()}
    out["prefix_rows"] = rows
    out["prefix_embs"] = prefix[:, rows]
    out["prefix_position_ids"] = prefix_positions(pad_mask)[:, rows]
    for n, (k, v) in enumerate(cache):
        out[f"prefix_k_l{n}"], out[f"prefix_v_l{n}"] = k[:, :, rows], v[:, :, rows]
        after = prefix_out if n == depth - 1 else seen.inputs[f"llm.layers.{n + 1}.input_norm"][0]
        out[f"prefix_hidden_l{n}"] = after[:, rows]
        following = "expert.norm" if n == depth - 1 else f"expert.layers.{n + 1}.input_norm"
        out[f"suffix_hidden_step0_l{n}"] = seen.inputs[following][0]
    out["prefix_out"] = normed[:, rows]
    out["suffix_embs_step0"] = seen.inputs["expert.layers.0.input_norm"][0]
    out["suffix_out_step0"] = seen.outputs["expert.norm"][0]
    out["time_emb_step0"] = time_embedding(times[0].expand(1), config.expert.width)
    out["step_time"], out["step_x_t"] = torch.stack(times), torch.stack(steps)
    if cond is not None:
        out["adarms_cond_step0"] = cond
    return out


@pytest.mark.parametrize(("case", "stage"), [(case, stage) for case in golden.STAGES for stage in golden.stages(case)])
def test_stage_is_openpis(case: str, stage: str) -> None:
    ours, theirs = recorded_stages(case)[stage], golden.stages(case)[stage]
    if not theirs.dtype.is_floating_point or stage == "step_time":
        assert torch.equal(ours, theirs.to(ours.dtype))
    else:
        assert rel_l2(ours, theirs) <= REGRESSION


@pytest.mark.parametrize("case", golden.STAGES)
def test_bfloat16_mode_is_openpis(case: str) -> None:
    """Kernels that accumulate differently move these actions by 0.002 to 0.007; a rounding in the wrong place by more.

    Measured: 0.0039 (pi0) and 0.0028 (pi05) from openpi's, which is 0.0087 and 0.0053 from float32.
    """
    theirs, exact = golden.expected(case, "actions__bf16_ropefix"), golden.expected(case)
    ours = actions_of(reference(golden.config_of(case), torch.bfloat16), case)
    assert rel_l2(ours, theirs) <= 0.9 * rel_l2(theirs, exact)
    assert rel_l2(ours, exact) <= 1.15 * rel_l2(theirs, exact)


@pytest.mark.parametrize("case", golden.STAGES)
def test_bfloat16_mode_rounds_the_parameters_that_openpi_rounds(case: str) -> None:
    """Rounded weights in float32 arithmetic: which tensors are rounded shows without any rounding of results."""
    config = golden.config_of(case)
    tensor = RandomCheckpoint(config).tensor

    def rounded(name: str) -> Tensor:
        return tensor(name) if keeps_full_values(name) else tensor(name).bfloat16().float()

    actions = actions_of(Pi0Reference.from_tensors(config, rounded), case)
    assert rel_l2(actions, golden.expected(case, "actions__bf16w_f32compute")) <= REGRESSION


def test_a_bfloat16_checkpoint_gives_openpis_actions() -> None:
    """Every tensor stored in bfloat16, as openpi's converter writes them."""
    case = "pi0_tiny_c00_base"
    config = golden.config_of(case)
    tensor = RandomCheckpoint(config, dtype=torch.bfloat16).tensor
    actions = actions_of(Pi0Reference.from_tensors(config, tensor), case)
    assert rel_l2(actions, golden.expected(case, "actions__bf16file_f32compute")) <= REGRESSION


def test_bfloat16_storage_is_openpis() -> None:
    """Float32 stays: both Gemmas' norms, the patch and position embeddings, everything outside the towers."""
    config = Pi0Config.load(golden.GOLDEN / "pi05_tiny.json")
    held = {name: p.dtype for name, p in reference(config, torch.bfloat16).named_parameters()}
    rounded = [
        "projector.bias",
        "vision.post_norm.weight",
        "llm.layers.0.q_proj.weight",
        "expert.layers.0.o_proj.weight",
    ]
    exact = ["llm.norm.weight", "expert.norm.dense.bias", "vision.patch_embedding.bias", "time_mlp_in.bias"]
    assert {held[name] for name in rounded} == {torch.bfloat16}
    assert {held[name] for name in exact} == {torch.float32}
    assert all(held[n] == storage_dtype(n, torch.bfloat16) for n in held)


@pytest.mark.full_size
@pytest.mark.parametrize("case", golden.FULL_SIZE)
def test_full_size_actions_are_openpis(case: str) -> None:
    config = golden.config_of(case)
    model = Pi0Reference.from_tensors(config, RandomCheckpoint(config).tensor)
    error = rel_l2(actions_of(model, case), golden.expected(case))
    print(f"{case}: reference float32 {error:.2e}")
    assert error <= 1e-4

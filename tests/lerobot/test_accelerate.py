"""``accelerate``: the same actions as lerobot's own model, everything around it untouched, and loud where it cannot."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.pi0 import PI0Config, PI0Policy
from lerobot.policies.pi05 import PI05Config, PI05Policy
from torch.multiprocessing.reductions import StorageWeakRef

from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.integrations.lerobot import LiveCheckpoint, accelerate, model_config, restore, sampler_of
from tests.lerobot.small_policies import IMAGES, random_batch, small_options, small_policy, worst

KINDS = ["pi0", "pi05"]
TOLERANCE = 1e-4


def both(kind: str, **changes: Any) -> tuple[Any, Any]:
    """lerobot's policy, and a copy of it on our engine."""
    theirs = small_policy(kind, **changes)
    return theirs, accelerate(copy.deepcopy(theirs))


def chunk(policy: Any, batch: dict, seed: int = 3, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    return policy.predict_action_chunk(batch, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_are_lerobots(kind: str, size: int) -> None:
    theirs, ours = both(kind)
    batch = random_batch(size)
    expected, actual = chunk(theirs, batch), chunk(ours, batch)
    assert expected.std() > 0.1  # random weights, but not a network that computes nothing
    assert worst(actual, expected) <= TOLERANCE
    assert (actual.dtype, actual.device) == (expected.dtype, expected.device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_number_generator_ends_where_lerobots_does(kind: str) -> None:
    theirs, ours = both(kind)
    states = []
    for policy in (theirs, ours):
        chunk(policy, random_batch())
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("kind", KINDS)
def test_given_noise_and_number_of_steps(kind: str) -> None:
    theirs, ours = both(kind)
    batch = random_batch(2)
    noise = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    few, many = (chunk(theirs, batch, noise=noise, num_steps=steps) for steps in (2, 10))
    assert worst(few, many) > 10 * TOLERANCE
    assert worst(chunk(ours, batch, noise=noise, num_steps=2), few) <= TOLERANCE
    assert worst(chunk(ours, batch, noise=noise, num_steps=10), many) <= TOLERANCE
    with pytest.raises(ValueError, match=r"noise is \[2, 15, 8\], expected \[2, 16, 8\]"):
        ours.predict_action_chunk(batch, noise=noise[:, 1:])
    with pytest.raises(TypeError, match="number_of_steps"):
        ours.predict_action_chunk(batch, number_of_steps=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policys_number_of_steps_is_read_at_every_call(kind: str) -> None:
    theirs, ours = both(kind)
    theirs.config.num_inference_steps = ours.config.num_inference_steps = 10
    assert worst(chunk(ours, random_batch()), chunk(theirs, random_batch())) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_camera_is_masked(kind: str) -> None:
    theirs, ours = both(kind)
    batch = random_batch(2)
    with_both = chunk(theirs, batch)
    del batch[f"{IMAGES}.top"]
    expected = chunk(theirs, batch)
    assert worst(expected, with_both) > 10 * TOLERANCE
    assert worst(chunk(ours, batch), expected) <= TOLERANCE


def test_frames_of_another_size_are_resized_by_lerobot() -> None:
    theirs, ours = both("pi0")
    batch = random_batch(1, **{f"{IMAGES}.top": torch.rand(1, 3, 40, 70)})
    assert worst(chunk(ours, batch), chunk(theirs, batch)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_select_action_and_its_queue(kind: str) -> None:
    """Nine calls are three chunks of four actions: only the first, fifth and ninth observation count."""
    theirs, ours = both(kind)
    actions = []
    for policy in (theirs, ours):
        torch.manual_seed(5)
        policy.reset()
        actions.append([policy.select_action(random_batch(2, seed=step)) for step in range(9)])
        policy.reset()
        actions[-1].append(policy.select_action(random_batch(2, seed=99)))
    for expected, actual in zip(*actions, strict=True):
        assert worst(actual, expected) <= TOLERANCE


def test_bfloat16_follows_the_policys_dtype() -> None:
    exact = small_policy("pi0")
    ours = accelerate(small_policy("pi0", dtype="bfloat16"))
    assert sampler_of(ours).engine.dtype == torch.bfloat16
    actual, expected = chunk(ours, random_batch(2)), chunk(exact, random_batch(2))
    assert 1e-4 < float((actual - expected).norm() / expected.norm()) <= 0.05


def test_an_engine_config_says_otherwise() -> None:
    policy = accelerate(small_policy("pi0"), EngineConfig(dtype="bfloat16", max_plans=2))
    assert sampler_of(policy).engine.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device is 'mps'"):
        accelerate(small_policy("pi0"), EngineConfig(device="mps"))


def test_autocast_does_not_reach_the_engine() -> None:
    policy = accelerate(small_policy("pi05"))
    plain = chunk(policy, random_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chunk(policy, random_batch()), plain)


def test_inference_mode_and_no_grad_take_turns() -> None:
    policy = small_policy("pi0")
    with torch.inference_mode():
        accelerate(policy)
        first = chunk(policy, random_batch())
    assert torch.equal(chunk(policy, random_batch()), first)
    with torch.inference_mode():
        assert torch.equal(chunk(policy, random_batch()), first)


def test_torch_compile_goes_around_the_engine() -> None:
    """lerobot-rollout wraps ``predict_action_chunk`` when it is told to compile."""
    policy = accelerate(small_policy("pi0"))
    plain = chunk(policy, random_batch())
    policy.predict_action_chunk = torch.compile(policy.predict_action_chunk, backend="eager")
    assert torch.equal(chunk(policy, random_batch()), plain)


def test_threads_take_turns() -> None:
    policy = accelerate(small_policy("pi0"))
    noises = [torch.randn(1, 16, 8) for _ in range(8)]
    expected = [policy.predict_action_chunk(random_batch(), noise=noise) for noise in noises]
    found: list[Any] = [None] * len(noises)

    def work(index: int) -> None:
        found[index] = policy.predict_action_chunk(random_batch(), noise=noises[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(noises))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- weights --------------------------------------------------------------------------------------------------------


def test_changed_weights_are_noticed() -> None:
    theirs, ours = both("pi0")
    changed = {key: value * 1.01 for key, value in theirs.state_dict().items()}
    for policy in (theirs, ours):
        policy.load_state_dict(changed)
    with pytest.raises(ValueError, match=r"weights changed after accelerate\(policy\): call it again"):
        ours.predict_action_chunk(random_batch())
    assert worst(chunk(accelerate(ours), random_batch()), chunk(theirs, random_batch())) <= TOLERANCE


def test_moving_a_policy_is_no_change_of_its_weights() -> None:
    policy = accelerate(small_policy("pi0"))
    before = chunk(policy, random_batch())
    assert torch.equal(chunk(policy.to("cpu").eval(), random_batch()), before)


def test_restore_gives_lerobots_model_back() -> None:
    theirs, ours = both("pi05")
    assert torch.equal(chunk(restore(ours), random_batch()), chunk(theirs, random_batch()))
    with pytest.raises(ValueError, match="this PI05Policy is not accelerated"):
        restore(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_released_weights_are_freed_where_nothing_reads_them(kind: str) -> None:
    policy = small_policy(kind)
    vision = policy.model.paligemma_with_expert.paligemma.model.vision_tower
    freed = [StorageWeakRef(parameter.untyped_storage()) for parameter in vision.parameters()]
    assert len(freed) > 30 and not any(storage.expired() for storage in freed)
    accelerate(policy, keep_weights=False)
    gc.collect()
    assert all(storage.expired() for storage in freed)
    policy.predict_action_chunk(random_batch(), num_steps=9)  # whose flow times are computed only now


@pytest.mark.parametrize("kind", KINDS)
def test_released_weights_leave_a_policy_that_only_acts(kind: str, tmp_path: Any) -> None:
    theirs = small_policy(kind)
    ours = accelerate(copy.deepcopy(theirs), keep_weights=False)
    assert sum(tensor.numel() for tensor in [*ours.parameters(), *ours.buffers()]) == 0
    assert worst(chunk(ours.to("cpu"), random_batch(2)), chunk(theirs, random_batch(2))) <= TOLERANCE
    with pytest.raises(RuntimeError, match="this policy only acts"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="this policy only acts"):
        ours.forward({**random_batch(), "action": torch.zeros(1, 16, 6)})
    with pytest.raises(ValueError, match="were not kept"):
        restore(ours)


def test_missing_unexpected_and_misshapen_weights_are_named() -> None:
    policy = small_policy("pi0")
    policy.model.action_in_proj = torch.nn.Linear(9, 28)
    policy.model.adapter = torch.nn.Linear(2, 2)
    del policy.model.state_proj
    with pytest.raises(ValueError) as error:
        accelerate(policy)
    text = str(error.value)
    assert "PI0Policy.model: the tensors are not those of the model (sizes from the policy's own config)" in text
    assert "missing (2)" in text and "state_proj.weight" in text
    assert "unexpected (2)" in text and "adapter.weight" in text
    assert "action_in_proj.weight: [28, 9], expected [28, 8]" in text
    policy.predict_action_chunk  # noqa: B018 - still lerobot's: nothing was installed
    with pytest.raises(ValueError, match="not accelerated"):
        sampler_of(policy)


@pytest.mark.parametrize(
    ("kind", "config", "policy"), [("pi0", PI0Config, PI0Policy), ("pi05", PI05Config, PI05Policy)]
)
def test_published_sizes_are_recognised(kind: Any, config: Any, policy: Any) -> None:
    """On torch's meta device: names and shapes of the 3-billion-parameter network, without its memory."""
    options = {"chunk_size": 50, "n_action_steps": 50, "num_inference_steps": 10}
    options |= {"max_state_dim": 32, "max_action_dim": 32, "image_resolution": (224, 224)}
    published = config(**small_options(tokenizer_max_length=config.tokenizer_max_length, **options))
    published.device = "meta"
    with torch.device("meta"):
        whole = policy(published)
    assert model_config(whole) == Pi0Config(kind)
    assert sum(torch.Size(shape).numel() for shape in LiveCheckpoint(whole).shapes.values()) > 3e9


# --- what is refused ------------------------------------------------------------------------------------------------


def test_other_policies_are_refused() -> None:
    options = small_options()
    act = ACTPolicy(
        ACTConfig(
            input_features=options["input_features"],
            output_features=options["output_features"],
            pretrained_backbone_weights=None,
            device="cpu",
        )
    )
    with pytest.raises(ValueError, match="ACTPolicy, expected lerobot's PI0Policy or PI05Policy"):
        accelerate(act)


def test_another_flow_time_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_period is 8.0; only 4.0 is supported"):
        accelerate(small_policy("pi0", max_period=8.0))


def test_inputs_are_checked() -> None:
    policy = accelerate(small_policy("pi0"))
    mask = "observation.language.attention_mask"
    with pytest.raises(ValueError, match="token_mask has a gap"):
        policy.predict_action_chunk(random_batch(1, **{mask: torch.arange(12)[None] > 5}))
    with pytest.raises(ValueError, match="state contains NaN"):
        policy.predict_action_chunk(random_batch(1, **{"observation.state": torch.full((1, 6), torch.nan)}))

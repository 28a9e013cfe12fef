"""The plug-in distribution: lerobot's tools find its policy types, and they load, act and save like lerobot's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.envs.configs import AlohaEnv
from lerobot.policies.factory import get_policy_class, make_policy, make_policy_config, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_policy_pi0_engine.__main__ import link_checkpoint
from safetensors.torch import load_file, save_file

from pi0_engine.integrations.lerobot import sampler_of
from tests.lerobot.small_policies import IMAGES, random_batch, small_options, small_policy, small_sizes, worst
from tests.support.checkpoints import write_peft

KINDS = ["pi0", "pi05"]
TOLERANCE = 1e-4
#: A robot that lerobot knows: ALOHA with one camera. Chunks are as long as small policies make them.
ALOHA = {
    "input_features": {
        f"{IMAGES}.top": PolicyFeature(FeatureType.VISUAL, (3, 480, 640)),
        "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (14,))},
    "max_state_dim": 16,
    "max_action_dim": 16,
    "tokenizer_max_length": 60,
}
STATISTICS = {
    key: {name: torch.full((14,), value) for name, value in (("mean", 0.1), ("std", 2.0), ("q01", -1.5), ("q99", 3.0))}
    for key in ("observation.state", "action")
}

register_third_party_plugins()


def saved(directory: Path, kind: str, **changes: Any) -> Any:
    """lerobot's policy, after its ``save_pretrained`` wrote it there."""
    policy = small_policy(kind, **changes)
    policy.save_pretrained(directory)
    return policy


def load(directory: Path, kind: str, **arguments: Any) -> Any:
    with small_sizes():
        return get_policy_class(f"{kind}_engine").from_pretrained(directory, **arguments)


def chunk(policy: Any, batch: dict | None = None) -> torch.Tensor:
    torch.manual_seed(3)
    return policy.predict_action_chunk(random_batch(2) if batch is None else batch)


def test_lerobot_discovers_the_types_in_a_fresh_process() -> None:
    script = """
import lerobot.policies
from lerobot.configs import PreTrainedConfig
from lerobot.utils.import_utils import register_third_party_plugins
before = set(PreTrainedConfig.get_known_choices())
register_third_party_plugins()
print(sorted(set(PreTrainedConfig.get_known_choices()) - before))
from lerobot.policies.factory import get_policy_class
print(get_policy_class("pi0_engine").__name__, get_policy_class("pi05_engine").__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.split("\n")[:2] == ["['pi05_engine', 'pi0_engine']", "PI0EnginePolicy PI05EnginePolicy"]


@pytest.mark.parametrize("kind", KINDS)
def test_lerobots_own_checkpoint_acts_alike(kind: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, kind)
    ours = load(tmp_path, kind)
    assert isinstance(ours, type(theirs)) and ours.config.type == f"{kind}_engine"
    assert ours.config.n_action_steps == 4 and ours.config.device == "cpu" and not ours.training
    assert worst(chunk(ours), chunk(theirs)) <= TOLERANCE
    actions = []
    for policy in (theirs, ours):
        torch.manual_seed(4)
        policy.reset()
        actions.append(torch.stack([policy.select_action(random_batch(2, seed=step)) for step in range(6)]))
    assert worst(actions[1], actions[0]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_again(kind: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path / "theirs", kind)
    load(tmp_path / "theirs", kind).save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["type"] == f"{kind}_engine"
    config = PreTrainedConfig.from_pretrained(tmp_path / "ours")
    assert worst(chunk(load(tmp_path / "ours", kind, config=config)), chunk(theirs)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_make_policy_and_processors(kind: str, tmp_path: Path) -> None:
    """The way of lerobot-eval: a config with a path, an environment, processors from the checkpoint or made anew."""
    theirs = saved(tmp_path, kind, **ALOHA, empty_cameras=0)
    made = make_pre_post_processors(theirs.config, dataset_stats=STATISTICS)
    for processor in made:
        processor.save_pretrained(tmp_path)
    config = make_policy_config(f"{kind}_engine", **small_options(**ALOHA, empty_cameras=0))
    anew = make_pre_post_processors(config, dataset_stats=STATISTICS)
    config.pretrained_path = tmp_path
    with small_sizes():
        ours = make_policy(config, env_cfg=AlohaEnv())
    assert type(ours) is get_policy_class(f"{kind}_engine")
    seen = {f"{IMAGES}.top": torch.rand(1, 3, 480, 640), "observation.state": torch.randn(1, 14), "task": ["pick it"]}
    results = []
    for policy, (before, after) in [
        (theirs, made),
        (ours, anew),
        (ours, make_pre_post_processors(config, pretrained_path=str(tmp_path))),
    ]:
        torch.manual_seed(1)
        policy.reset()
        results.append(after(policy.select_action(before(seen))))
    assert results[0].shape == (1, 14)
    for result in results[1:]:
        assert worst(result, results[0]) <= 2 * TOLERANCE  # the actions' standard deviation is 2


def test_linked_checkpoints_are_of_our_type(tmp_path: Path) -> None:
    """For the command line, which takes the type from config.json."""
    theirs = saved(tmp_path / "theirs", "pi05", use_peft=False)
    (tmp_path / "theirs" / "policy_preprocessor.json").write_text("{}")
    command = [sys.executable, "-m", "lerobot_policy_pi0_engine", str(tmp_path / "theirs"), str(tmp_path / "linked")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"--policy.path={tmp_path / 'linked'}"
    assert (tmp_path / "linked" / "policy_preprocessor.json").read_text() == "{}"
    assert (tmp_path / "linked" / "model.safetensors").is_symlink()
    config = PreTrainedConfig.from_pretrained(tmp_path / "linked")
    assert config.type == "pi05_engine"
    assert worst(chunk(load(tmp_path / "linked", "pi05", config=config)), chunk(theirs)) <= TOLERANCE
    with pytest.raises(ValueError, match="type is 'pi05_engine', expected one of"):
        link_checkpoint(str(tmp_path / "linked"), tmp_path / "again")
    with pytest.raises(ValueError, match="exists already"):
        link_checkpoint(str(tmp_path / "theirs"), tmp_path / "linked")


def test_a_lora_adapter_is_merged(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "base", "pi0")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 8, generator=random), torch.randn(28, 4, generator=random)
    write_peft(
        tmp_path / "adapter",
        str(tmp_path / "base"),
        {"action_in_proj.lora_A.weight": down, "action_in_proj.lora_B.weight": up},
    )
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({**config, "use_peft": True}))
    before = chunk(theirs)
    with torch.no_grad():
        theirs.model.action_in_proj.weight += 10 / 4 * up @ down
    expected = chunk(theirs)
    assert worst(expected, before) > 0.1
    ours = load(tmp_path / "adapter", "pi0")
    assert worst(chunk(ours), expected) <= TOLERANCE
    ours.save_pretrained(tmp_path / "again")
    assert worst(chunk(load(tmp_path / "again", "pi0")), expected) <= TOLERANCE


def test_the_backend_is_an_option(tmp_path: Path) -> None:
    saved(tmp_path, "pi0")
    config = make_policy_config("pi0_engine", **small_options(engine_backend="torch"))
    choices = sampler_of(load(tmp_path, "pi0", config=config)).engine.ops.choices
    assert {choice.implementation for choice in choices} == {"torch"}
    config.engine_backend = "fastest"
    with pytest.raises(ValueError, match="backend is 'fastest'"):
        load(tmp_path, "pi0", config=config)


# --- loud where lerobot's own loader only prints --------------------------------------------------------------------


def test_missing_and_unexpected_weights_raise(tmp_path: Path) -> None:
    saved(tmp_path, "pi0")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.state_proj.bias"]
    save_file({**tensors, "model.extra.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"missing \(1\):\n +state_proj.bias\n +unexpected \(1\):\n +model.extra"):
        load(tmp_path, "pi0")
    file.unlink()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load(tmp_path, "pi0")


def test_what_cannot_be_an_engine_policy_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "pi0")
    with pytest.raises(ValueError, match="got a PI0Config, expected PI05EngineConfig or PI05Config"):
        load(tmp_path, "pi05")
    with pytest.raises(ValueError, match="strict is False"):
        load(tmp_path, "pi0", strict=False)
    config = make_policy_config("pi0_engine", **small_options(use_peft=True))
    with pytest.raises(ValueError, match=r"--policy\.use_peft=false"):
        load(tmp_path, "pi0", config=config)
    with pytest.raises(ValueError, match="PI0EnginePolicy has no weights of its own: load a checkpoint"):
        get_policy_class("pi0_engine")(make_policy_config("pi0_engine", **small_options()))


def test_an_engine_policy_does_not_train(tmp_path: Path) -> None:
    saved(tmp_path, "pi0")
    with pytest.raises(RuntimeError, match="this policy only acts"):
        load(tmp_path, "pi0").forward({**random_batch(), "action": torch.zeros(1, 16, 6)})

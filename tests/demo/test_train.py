"""Training of the demo's model: the loss is π0's, a stopped run goes on, the result is a checkpoint."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import SafetensorError

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.config import EngineConfig
from pi0_engine.demo import train as training
from pi0_engine.demo.batches import Batches
from pi0_engine.demo.dataset import Demonstrations
from pi0_engine.demo.make_tokenizer import VOCABULARY, make_tokenizer
from pi0_engine.demo.model import CONFIG, initialized, save_checkpoint
from pi0_engine.demo.objective import flow_matching_loss
from pi0_engine.demo.tasks import TASKS
from pi0_engine.demo.train import Recipe, main, train
from pi0_engine.demo.training_state import TrainingState
from pi0_engine.measuring.cases import sample_reference
from pi0_engine.policy import Pi0Policy
from pi0_engine.reference.model import Pi0Reference, sample_training_time
from pi0_engine.text.tokenizer import load_tokenizer

RECIPE = Recipe(steps=2, post_steps=2, batch=3, draws=2)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    for number, name in enumerate(["reach-noisy", "reach-clean", "drawer-open-noisy", "drawer-open-clean"]):
        rng = np.random.default_rng(number)
        Demonstrations(
            frames=rng.integers(0, 256, (6, 2, 64, 64, 3), dtype=np.uint8),
            states=(rng.standard_normal((6, 4)) * 0.1 + 0.5).astype(np.float32),
            actions=rng.uniform(-1, 1, (30, 4)).astype(np.float32),
            first=np.arange(0, 12, 2),
            end=np.full(6, 20),
        ).save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(demonstrations, output, RECIPE, progress=False)
    return output


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(make_tokenizer())
    return file


def other_tokenizer() -> bytes:
    """Of other instructions: the words of the demo's come out in other pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["tidy the table", "fold the towel", "pour some tea", "close the lid"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def test_the_loss_is_the_references_over_several_noises(demonstrations: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    model, generator = initialized(CONFIG, seed=0), torch.Generator().manual_seed(1)
    batch = Batches(demonstrations, CONFIG, tokenizer).draw(4, generator, clean=False)
    assert not batch.valid.all() and batch.valid.any(dim=1).all(), "some chunks end early"
    noise, time = torch.randn(4, 3, 16, 8), sample_training_time(12).view(4, 3)
    with torch.no_grad():
        prefix, pad = model.embed_prefix(batch.images, batch.image_masks, batch.tokens, batch.token_mask)
        each = [model.loss(prefix, pad, batch.state, batch.actions, noise[:, k], time[:, k]) for k in range(3)]
        expected = torch.stack([losses[batch.valid] for losses in each]).mean()
        loss = flow_matching_loss(model, batch, noise, time)
    assert abs(loss - expected) <= 1e-5 * expected


def test_batches_hold_normalised_demonstrations(demonstrations: Path, tokenizer: Path) -> None:
    batches = Batches(demonstrations, CONFIG, tokenizer)
    drawn = [batches.draw(64, torch.Generator().manual_seed(seed), clean=True) for seed in range(4)]
    states = torch.cat([batch.state for batch in drawn])
    actions = torch.cat([batch.actions for batch in drawn])
    assert abs(states[:, :4].mean()) < 0.3 and 0.6 < states[:, :4].std() < 1.4
    assert not states[:, 4:].any() and not actions[..., 4:].any()
    assert states[:, 0].unique().numel() == 12, "all clean observations, and no noisy one"
    assert drawn[0].images.min() >= -1 and drawn[0].images.max() <= 1
    again = batches.draw(64, torch.Generator().manual_seed(0), clean=True)
    assert all(torch.equal(getattr(again, f.name), getattr(drawn[0], f.name)) for f in dataclasses.fields(again))


def test_missing_demonstrations_are_named(demonstrations: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no clean demonstrations: run python -m pi0_engine\.demo\.collect"):
        Batches(tmp_path, CONFIG, tokenizer)
    (tmp_path / "reach-clean.safetensors").symlink_to(demonstrations / "reach-clean.safetensors")
    with pytest.raises(ValueError, match="holds no noisy demonstrations"):
        Batches(tmp_path, CONFIG, tokenizer)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_a_resumed_run_is_the_same_run(device: str, tmp_path: Path) -> None:
    def steps(state: TrainingState, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            hidden = torch.randn(5, 128).to(device)
            velocity = state.model.action_out_proj(hidden) + state.model.state_proj.weight.sum()
            velocity.square().mean().backward()
            state.update(RECIPE.rate_at(number), RECIPE.average)

    def fresh(path: Path) -> TrainingState:
        return TrainingState.resume(path, initialized(CONFIG, seed=0).to(device), RECIPE)

    whole = fresh(tmp_path / "whole.safetensors")
    steps(whole, range(4))
    first = fresh(tmp_path / "state.safetensors")
    steps(first, range(2))
    first.save()
    second = fresh(tmp_path / "state.safetensors")
    assert second.step == 2
    steps(second, range(2, 4))
    for models in ((whole.model, second.model), (whole.averaged(), second.averaged())):
        for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other), name
    with pytest.raises(ValueError, match=r"was trained with .*\"steps\": 2.* expected .*\"steps\": 3"):
        TrainingState.resume(tmp_path / "state.safetensors", initialized(CONFIG, seed=0), Recipe(steps=3))


def test_the_result_is_a_checkpoint_like_any_other(trained: Path) -> None:
    folder = trained / "checkpoint"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 16e6
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG and checkpoint.format == "openpi-pytorch"
    policy = Pi0Policy.from_checkpoint(folder, robot="metaworld", engine=EngineConfig(dtype="float32"))
    rng = np.random.default_rng(0)
    top, side = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    observation = {"observation/top": top, "observation/side": side, "observation/state": np.full(4, 0.5)}
    noise = rng.standard_normal((16, 8), dtype=np.float32)
    actions = policy.infer({**observation, "prompt": "open the drawer"}, noise=noise)["actions"]
    inputs, context = policy.transform.prepare({**observation, "prompt": "open the drawer"})
    reference = Pi0Reference.from_tensors(CONFIG, checkpoint.tensor)
    expected = policy.transform.finish(sample_reference(reference, inputs, torch.from_numpy(noise)[None], 10), context)
    assert actions.shape == (16, 4)
    np.testing.assert_allclose(actions, expected[0], atol=1e-4)


def test_a_finished_run_stays_and_has_its_picture(trained: Path, demonstrations: Path) -> None:
    before = (trained / "checkpoint" / "model.safetensors").read_bytes()
    train(demonstrations, trained, RECIPE, progress=False)
    assert (trained / "checkpoint" / "model.safetensors").read_bytes() == before
    assert (trained / "loss.png").stat().st_size > 1000
    for line in (trained / "loss.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] > 0


def test_a_run_that_was_stopped_before_its_last_checkpoint_gets_it(
    trained: Path, demonstrations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    save_checkpoint(run / "checkpoint", initialized(CONFIG, seed=1), {}, {}, b"an older one")
    train(demonstrations, run, RECIPE, progress=False)
    for path in (trained / "checkpoint").rglob("*"):
        if path.is_file():
            assert (run / path.relative_to(trained)).read_bytes() == path.read_bytes(), path.name


def test_weights_are_written_whole_or_not_at_all(trained: Path, tmp_path: Path) -> None:
    """Writing stops after one of 4.7 MB."""
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    before, limits = weights.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(SafetensorError, match="File too large"):
            save_checkpoint(tmp_path / "checkpoint", initialized(CONFIG, seed=1), {}, {}, b"")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weights.read_bytes() == before


def test_the_checkpoint_has_the_tokenizer_that_it_was_trained_with(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is shipped, and for a resumed run whatever a run that begins today would have."""
    drawn: list[torch.Tensor] = []

    def keep_tokens(model: Any, batch: Any, *rest: torch.Tensor) -> torch.Tensor:
        drawn.append(batch.tokens)
        return flow_matching_loss(model, batch, *rest)

    monkeypatch.setattr(training, "flow_matching_loss", keep_tokens)

    def check(file: Path, unlike: bytes) -> None:
        (tmp_path / "unlike.model").write_bytes(unlike)
        with_file, with_other = (
            {tuple(load_tokenizer(path, CONFIG).encode_prompt(prompt)[0]) for prompt in prompts}
            for path in (file, tmp_path / "unlike.model")
        )
        seen = {tuple(row.tolist()) for batch in drawn for row in batch}
        assert seen and seen <= with_file and not seen & with_other

    prompts = [prompt for task in ("reach", "drawer-open") for prompt in TASKS[task].prompts]
    run = tmp_path / "run"
    train(demonstrations, run, RECIPE, progress=False)
    check(run / "checkpoint" / "tokenizer.model", unlike=other_tokenizer())

    state = TrainingState.resume(tmp_path / "state.safetensors", initialized(CONFIG, RECIPE.seed), RECIPE)
    state.save()
    shutil.rmtree(run / "checkpoint")
    state.path.replace(run / "state.safetensors")
    (run / "tokenizer.model").write_bytes(other_tokenizer())
    drawn.clear()
    train(demonstrations, run, RECIPE, progress=False)
    check(run / "checkpoint" / "tokenizer.model", unlike=make_tokenizer())

    (run / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"has a state\.safetensors and no tokenizer\.model"):
        train(demonstrations, run, RECIPE, progress=False)


def test_the_step_size_rises_and_falls() -> None:
    recipe = Recipe(steps=800, post_steps=200, warm_up=100)
    rates = [recipe.rate_at(step) for step in range(1000)]
    assert max(rates) == rates[99] == recipe.rate and rates[0] == recipe.rate / 100
    assert all(one >= two for one, two in itertools.pairwise(rates[100:]))
    assert abs(rates[-1] - recipe.last_rate) < 1e-3 * recipe.rate


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "run")]) == 2
    assert "holds no clean demonstrations" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "run"), "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err

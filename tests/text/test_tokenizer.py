from __future__ import annotations

import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from pi0_engine.config import GEMMA_2B, Pi0Config
from pi0_engine.text.files import demo_tokenizer, find_tokenizer
from pi0_engine.text.tokenizer import HuggingFaceEncoder, SentencePieceEncoder, load_tokenizer
from pi0_engine.text.tokenizer import Tokenizer as PromptTokenizer

TEXT = ["fold the towel", "pick up the red cube", "Task: put it down, State: 12 255 -1;", "Action: ", "open the drawer"]


def config(model_type: Any = "pi0", vocab_size: int = 512, **changes: Any) -> Pi0Config:
    return Pi0Config(model_type, llm=dataclasses.replace(GEMMA_2B, vocab_size=vocab_size), **changes)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny sentencepiece model and the same vocabulary and merges as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3), model_writer=model, model_type="bpe", vocab_size=340, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["\n"], split_digits=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tiny.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
    # A byte-pair merge per way to split a piece, in the order in which the pieces were learned.
    merges = [
        (piece[:cut], piece[cut:])
        for piece, index in vocab.items()
        if index >= 261  # 4 control pieces, the newline, 256 bytes
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    # What a saved tokenizer carries and must not matter here: bos on its own, truncation, padding.
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made.enable_truncation(3)
    made.enable_padding(length=64)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    return folder


class Spelling:
    """An encoder without learning: one id per character, so that expected ids can be written down."""

    bos_id, vocab_size = 2, 300

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [ord(letter) for letter in text]


def spell(cfg: Pi0Config, encoder: Spelling | None = None) -> PromptTokenizer:
    return PromptTokenizer(encoder or Spelling(), cfg, "spelling")


# --- prompt formats -----------------------------------------------------------------------------------------------


def test_pi0_prompt() -> None:
    ids, mask = spell(config()).encode_prompt("  fold_the\ntowel \n")
    expected = [2, *map(ord, "fold the towel"), ord("\n")]
    assert ids.dtype == np.int64 and mask.dtype == np.bool_ and ids.shape == mask.shape == (48,)
    assert ids.tolist() == expected + [0] * (48 - len(expected))
    assert mask.tolist() == [True] * len(expected) + [False] * (48 - len(expected))


def test_pi0_parts_are_tokenised_separately() -> None:
    # Joined, a tokenizer may find a piece that spans both.
    encoder = Spelling()
    spell(config(), encoder).encode_prompt("fold")
    assert encoder.texts == ["fold", "\n"]


def test_pi0_never_has_the_state_in_its_prompt() -> None:
    ids, mask = spell(config(discrete_state_input=True)).encode_prompt("go", state=[0.0])
    assert ids[mask].tolist() == [2, *map(ord, "go\n")]


def test_pi05_prompt_holds_the_bins_of_the_state() -> None:
    tokenizer = spell(config("pi05"))
    # 256 bins of width 1/128 from -1; -1 below the first edge, 255 from the last one on: nothing is clipped.
    state = [-1.001, -1.0, -0.9922, 0.0, 0.00782, 0.9921, 0.9922, 1.0, 7.5]
    bins = [-1, 0, 0, 128, 129, 254, 255, 255, 255]
    ids, mask = tokenizer.encode_prompt(" pick_up ", np.array(state))
    expected = "Task: pick up, State: " + " ".join(map(str, bins)) + ";\nAction: "
    assert ids.shape == (200,)
    assert ids[mask].tolist() == [2, *map(ord, expected)]


def test_pi05_without_state_in_the_prompt_has_the_pi0_format() -> None:
    tokenizer = spell(config("pi05", discrete_state_input=False))
    ids, mask = tokenizer.encode_prompt("go", state=[0.0])
    assert ids.shape == (200,)
    assert ids[mask].tolist() == [2, *map(ord, "go\n")]


@pytest.mark.parametrize(
    ("state", "message"), [(None, "expected a state"), ([[0.0]], r"shape \[1, 1\]"), ([np.nan], "finite")]
)
def test_pi05_refuses_a_bad_state(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spell(config("pi05")).encode_prompt("go", state)


def test_a_long_prompt_is_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = spell(config(max_token_len=10))
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode_prompt("abcdefgh")
    assert not caplog.records and mask.all(), "bos, eight letters and the newline fit exactly"
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode_prompt("abcdefghi")
    assert "11 tokens and is cut to 10" in caplog.text
    assert ids.tolist() == [2, *map(ord, "abcdefghi")] and mask.all()


def test_a_prompt_seen_before_is_looked_up() -> None:
    encoder = Spelling()
    tokenizer = spell(config("pi05"), encoder)
    first = tokenizer.encode_prompt("go", [0.5])
    assert tokenizer.encode_prompt(" go ", [0.5001]) is first and len(encoder.texts) == 1
    tokenizer.encode_prompt("go", [0.6])
    assert len(encoder.texts) == 2
    with pytest.raises(ValueError, match="read-only"):
        first[0][0] = 1


# --- the two file formats -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁"), max_size=30) | st.sampled_from(TEXT))
def test_sentencepiece_and_hugging_face_files_agree(files: Path, text: str) -> None:
    ours, theirs = SentencePieceEncoder(files / "tiny.model"), HuggingFaceEncoder(files / "tokenizer.json")
    assert ours.bos_id == theirs.bos_id == 2
    assert ours.vocab_size == theirs.vocab_size == 340
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("model_type", ["pi0", "pi05"])
def test_whole_prompts_agree(files: Path, model_type: str) -> None:
    state = np.linspace(-1.2, 1.2, 14)
    results = [
        load_tokenizer(files / name, config(model_type)).encode_prompt("pick up_the red cube", state)
        for name in ("tiny.model", "tokenizer.json")
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_a_folder_with_either_is_accepted(files: Path, tmp_path: Path) -> None:
    assert load_tokenizer(files, config()).source.endswith("tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes((files / "tiny.model").read_bytes())
    assert load_tokenizer(tmp_path, config()).source.endswith("tokenizer.model")


def test_the_demo_tokenizer_fits_the_small_models() -> None:
    tokenizer = load_tokenizer(demo_tokenizer(), config(vocab_size=2048))
    ids, mask = tokenizer.encode_prompt("fold the towel")
    assert ids[0] == 2 and mask.sum() < 10 and ids.max() < 1024
    # Text it never saw becomes bytes, not "unknown" (3).
    ids, _ = tokenizer.encode_prompt("naïve 折る ☃")
    assert 3 not in ids
    assert demo_tokenizer().stat().st_size < 50_000


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_vocabulary_larger_than_the_models_is_refused(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("tiny.model", "tokenizer.json"):
        with pytest.raises(ValueError, match="340 pieces, the model embeds 339"):
            load_tokenizer(files / name, config(vocab_size=339))
        load_tokenizer(files / name, config(vocab_size=340))
    assert not caplog.records
    load_tokenizer(files / "tiny.model", config(vocab_size=257152))
    assert "right only for random weights" in caplog.text


def test_an_id_beyond_the_models_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives token id 8364, the model embeds 0\.\.511"):
        spell(config()).encode_prompt("5 €")


def test_files_that_are_no_tokenizers_are_refused(files: Path, tmp_path: Path) -> None:
    for name in ("broken.model", "broken.json"):
        (tmp_path / name).write_bytes(b"\x00nonsense")
        with pytest.raises(ValueError, match=f"{name} is not a"):
            load_tokenizer(tmp_path / name, config())
    (tmp_path / "vocab.txt").touch()
    for source, message in (
        (tmp_path / "absent.model", "does not exist"),
        (tmp_path / "vocab.txt", "neither a sentencepiece .model nor"),
        (tmp_path, "no tokenizer in .* expected one of paligemma_tokenizer.model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(source, config())
    (tmp_path / "tokenizer.json").write_bytes((files / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="no beginning-of-sequence token '<bos>'"):
        load_tokenizer(tmp_path, config())


# --- where it is found --------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and no network."""
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_tokenizer_found_nowhere_says_where_it_looked_and_how_to_get_it(nowhere: Path) -> None:
    with pytest.raises(ValueError) as error:
        find_tokenizer(nowhere / "model")
    message = str(error.value)
    for part in (
        str(nowhere / "model"), str(nowhere / "openpi" / "big_vision"), "google/paligemma-3b-pt-224",
        "HF_HUB_OFFLINE is set", "curl", "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model",
    ):  # fmt: skip
        assert part in message


def test_the_order_in_which_a_tokenizer_is_found(nowhere: Path) -> None:
    model = nowhere / "model"
    snapshot = nowhere / "hub" / "models--google--paligemma-3b-pt-224"
    _place(snapshot / "refs" / "main").write_text("abc")
    expected = []
    for path in (
        snapshot / "snapshots" / "abc" / "tokenizer.json",
        snapshot / "snapshots" / "abc" / "tokenizer.model",
        nowhere / "openpi" / "big_vision" / "paligemma_tokenizer.model",
        model / "tokenizer" / "tokenizer.json",
        model / "tokenizer.json",
        model / "paligemma_tokenizer.model",
    ):
        expected.append(_place(path))
        assert find_tokenizer(model) == path
    weights = _place(model / "model.safetensors")
    assert find_tokenizer(weights) == expected[-1]
    assert find_tokenizer() == expected[2]

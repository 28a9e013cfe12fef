"""Instructions to token ids: the prompt formats of π0 and π0.5 over a sentencepiece or a Hugging Face tokenizer.

π0, and π0.5 checkpoints trained without the state in the prompt: bos, the text, then a newline as "start of answer".
π0.5: ``Task: {text}, State: {bins};\\nAction: ``, the state discretised into 256 bins.
Formats and cleaning as in openpi ``models/tokenizer.py``.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.text.files import TOKENIZER_FILES, tokenizer_in

logger = logging.getLogger(__name__)

Encoded = tuple[NDArray[np.int64], NDArray[np.bool_]]

#: Left edges of the 256 bins that [-1, 1] is cut into.
_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]
#: Prompts remembered per tokenizer; the least recently used is forgotten.
_CACHE_SIZE = 512


class TextEncoder(Protocol):
    """Text to pieces. ``vocab_size`` counts the trained vocabulary, without tokens added later."""

    bos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...


class SentencePieceEncoder:
    """A sentencepiece ``.model`` file, e.g. openpi's ``paligemma_tokenizer.model``."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        self.bos_id = int(self._model.bos_id())
        self.vocab_size = int(self._model.vocab_size())
        if self.bos_id < 0:
            raise ValueError(f"{path} has no beginning-of-sequence token, which every prompt starts with")

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))


class HuggingFaceEncoder:
    """A ``tokenizer.json`` of the tokenizers library, e.g. that of ``google/paligemma-3b-pt-224``."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        # A saved file may carry padding and truncation of its training; both are decided here instead.
        self._model.no_padding()
        self._model.no_truncation()
        bos = _bos_token(path)
        bos_id = self._model.token_to_id(bos)
        if bos_id is None:
            raise ValueError(f"{path} has no beginning-of-sequence token {bos!r}, which every prompt starts with")
        self.bos_id = int(bos_id)
        self.vocab_size = int(self._model.get_vocab_size(with_added_tokens=False))

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)


def _bos_token(path: Path) -> str:
    """The bos token that ``tokenizer_config.json`` beside the file names; Gemma's ``<bos>`` where there is none."""
    settings_file = path.parent / "tokenizer_config.json"
    if not settings_file.is_file():
        return "<bos>"
    try:
        token: Any = json.loads(settings_file.read_text()).get("bos_token", "<bos>")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"cannot read {settings_file}: {error}") from error
    return str(token["content"] if isinstance(token, dict) else token)


class Tokenizer:
    """Prompts of one model as fixed-length token ids.

    Args:
        encoder: text to pieces.
        config: model type, prompt length and vocabulary of the model.
        source: where the encoder came from, for messages.

    Raises:
        ValueError: the encoder's vocabulary is larger than the model's.
    """

    def __init__(self, encoder: TextEncoder, config: Pi0Config, source: str) -> None:
        vocab_size = config.llm.vocab_size
        assert vocab_size is not None
        if encoder.vocab_size > vocab_size:
            raise ValueError(
                f"{source} has {encoder.vocab_size} pieces, the model embeds {vocab_size}: "
                "tokenizer and checkpoint do not belong together"
            )
        if encoder.vocab_size * 2 < vocab_size:
            logger.warning(
                "%s has %d pieces, the model embeds %d: right only for random weights",
                source, encoder.vocab_size, vocab_size,
            )  # fmt: skip
        self.config = config
        self.source = source
        self._encoder = encoder
        self._model_vocab_size = vocab_size
        self._cached = functools.lru_cache(_CACHE_SIZE)(self._encode)

    @property
    def uses_state(self) -> bool:
        """Whether the prompt holds the discretised state (π0.5, unless trained without)."""
        return self.config.is_pi05 and bool(self.config.discrete_state_input)

    def encode_prompt(self, text: str, state: ArrayLike | None = None) -> Encoded:
        """Token ids of an instruction.

        The text loses surrounding whitespace, and ``_`` and newlines in it become spaces. A prompt longer than
        ``config.max_token_len`` is cut at the end with a logged warning, as openpi does: π0.5 then loses its
        ``Action: `` and part of the state, so shorten the instruction instead. A prompt seen before is looked up.

        Args:
            text: the instruction.
            state: float [D], normalised, not yet padded: needed where :attr:`uses_state`, ignored elsewhere.

        Returns:
            ids int64 [L] padded with 0, and mask bool [L], True for real tokens. Shared and read-only: copy to write.

        Raises:
            ValueError: a state that is missing, not one-dimensional or not finite; an id the model does not embed.
        """
        cleaned = text.strip().replace("_", " ").replace("\n", " ")
        if not self.uses_state:
            return self._cached((cleaned, "\n"))
        return self._cached((f"Task: {cleaned}, State: {_bins(state)};\nAction: ",))

    def _encode(self, parts: tuple[str, ...]) -> Encoded:
        """bos, then each part tokenised by itself."""
        found = [self._encoder.bos_id, *(token for part in parts for token in self._encoder.encode(part))]
        length = self.config.token_capacity
        if len(found) > length:
            logger.warning("the prompt has %d tokens and is cut to %d: %.200r", len(found), length, "".join(parts))
        found = found[:length]
        if max(found) >= self._model_vocab_size:
            raise ValueError(
                f"{self.source} gives token id {max(found)}, the model embeds 0..{self._model_vocab_size - 1}: "
                "tokenizer and checkpoint do not belong together"
            )
        ids, mask = np.zeros(length, np.int64), np.zeros(length, np.bool_)
        ids[: len(found)], mask[: len(found)] = found, True
        ids.setflags(write=False)
        mask.setflags(write=False)
        return ids, mask


def _bins(state: ArrayLike | None) -> str:
    """The state as text: bin 0..255 of each value; -1 below the first edge, 255 above the last (nothing is clipped)."""
    if state is None:
        raise ValueError("this π0.5 model reads the state from its prompt: expected a state, got None")
    values = np.asarray(state, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"state has shape {list(values.shape)}, expected finite numbers [D]: {values}")
    return " ".join(map(str, (np.digitize(values, _BIN_EDGES) - 1).tolist()))


def load_tokenizer(source: str | Path, config: Pi0Config) -> Tokenizer:
    """A tokenizer from a sentencepiece ``.model`` file, a ``tokenizer.json``, or a folder with either.

    Raises:
        ValueError: no such file, not a tokenizer, no bos token, or a vocabulary larger than the model's.
    """
    path = Path(source)
    file = tokenizer_in(path) if path.is_dir() else path
    if file is None:
        raise ValueError(f"no tokenizer in {path}: expected one of {', '.join(TOKENIZER_FILES)}")
    if not file.is_file():
        raise ValueError(f"tokenizer {file} does not exist")
    if file.suffix not in (".model", ".json"):
        raise ValueError(f"tokenizer {file} is neither a sentencepiece .model nor a tokenizer.json")
    encoder: TextEncoder = SentencePieceEncoder(file) if file.suffix == ".model" else HuggingFaceEncoder(file)
    return Tokenizer(encoder, config, str(file))

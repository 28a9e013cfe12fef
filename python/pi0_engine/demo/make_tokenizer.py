"""Makes the tokenizer of the demo's model from its instructions: ``python -m pi0_engine.demo.make_tokenizer FILE``."""

from __future__ import annotations

import io
import string
import sys
from pathlib import Path

from pi0_engine.demo.tasks import TASKS

#: 256 bytes, the characters, and room for the instructions' words.
VOCABULARY = 448


def make_tokenizer() -> bytes:
    """A sentencepiece model. Words that no instruction has come out as pieces of words, and anything else as bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prompt for task in TASKS.values() for prompt in task.prompts]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(make_tokenizer())

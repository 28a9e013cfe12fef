"""Trains ``demo_tokenizer.model``, the tokenizer for models with random weights: ``python make_demo_tokenizer.py``.

Structured as PaliGemma's (pad 0, eos 1, bos 2, unk 3, newline a piece of its own, bytes for unknown letters, single
digits), but with 1024 pieces learned from made-up robot instructions, so that the demonstration needs no download.
"""

from __future__ import annotations

import io
import itertools
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

_VERBS = (
    "pick up|place|grasp|lift|push|pull|rotate|wipe|fold|open|close|pour|stack|insert|hand over|move|put down|turn on|"
    "turn off|sort|unplug|press|slide|hold|transfer|uncap|clean|pack|take|reach for"
)
_COLOURS = "red|blue|green|yellow|white|black|small|large|left|right|wooden|metal|empty|full"
_OBJECTS = (
    "cube|towel|mug|cup|bottle|drawer|plate|spoon|fork|bowl|box|sponge|pen|marker|screwdriver|banana|apple|shirt|lid|"
    "jar|tray|book|cable|button|door|basket|napkin|kettle|pan|toy|bag|block|peg|socket|tupperware|food|dishes|laundry"
)
_PLACES = (
    "on the table|into the bin|in the sink|next to the box|on the shelf|in the drawer|onto the plate|to the other arm|"
    "behind the bottle|under the lamp|in front of the robot|at the back of the counter|with both hands|carefully|slowly"
)


def instructions() -> Iterator[str]:
    """About 4000 instructions, each also in the form of a π0.5 prompt with its start."""
    split = [words.split("|") for words in (_VERBS, _COLOURS, _OBJECTS, _PLACES)]
    for index, (verb, colour, thing, place) in enumerate(itertools.product(*split)):
        if index % 61 == 0:
            yield f"{verb} the {colour} {thing} {place}"
            yield f"Task: {verb} the {thing} {place}, State: {index % 256} {index % 199};"
            yield "Action: "


def main() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=instructions(),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    Path(__file__).with_name("demo_tokenizer.model").write_bytes(model.getvalue())


if __name__ == "__main__":
    main()

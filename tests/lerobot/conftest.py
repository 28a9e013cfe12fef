"""These tests need lerobot in an environment of its own: ``make test-lerobot``. Elsewhere they are not collected.

They are offline: the Hub's cache is a folder of this run, and holds a tokenizer under the name of PaliGemma's.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from pathlib import Path

import pytest

_INSTALLED = any(distribution.name == "lerobot" for distribution in importlib.metadata.distributions())
collect_ignore_glob = [] if _INSTALLED else ["*.py"]

_HUB = tempfile.TemporaryDirectory(prefix="pi0-engine-hub-")
if _INSTALLED:  # elsewhere this file is read too, and must leave the other tests alone
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_HUB.name)  # before huggingface_hub is imported; children inherit it
    import torch

    torch.set_num_threads(1)  # models this small lose by sharing


@pytest.fixture(scope="session", autouse=True)
def tokenizer() -> None:
    """What lerobot's processors ask for by name: one token per word or sign, as many as the small models know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(chr(code) for code in range(32, 127))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model = Path(_HUB.name, "hub", "models--google--paligemma-3b-pt-224")
    revision = "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(model / "snapshots" / revision)
    (model / "snapshots" / revision / "config.json").write_text("{}")

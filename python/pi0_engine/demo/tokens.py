"""The tokenizer that ships with the demo's checkpoint."""

from __future__ import annotations

from pathlib import Path

from pi0_engine.config import Pi0Config
from pi0_engine.tokenizer import Tokenizer, load_tokenizer

#: The shipped checkpoint: openpi's PyTorch layout.
CHECKPOINT = Path(__file__).parent.parent / "data" / "metaworld"


def load_demo_tokenizer(config: Pi0Config) -> Tokenizer:
    return load_tokenizer(CHECKPOINT / "tokenizer.model", config)

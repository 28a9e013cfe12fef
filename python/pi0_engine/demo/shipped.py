"""Where the checkpoint is that ships with the demo."""

from __future__ import annotations

from pathlib import Path

#: openpi's PyTorch layout, with the tokenizer that it was trained with.
CHECKPOINT = Path(__file__).parent.parent / "data" / "metaworld"

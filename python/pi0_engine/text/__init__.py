"""Instructions on their way to the network.

In: text, for π0.5 with the robot's state. Out: token ids in the prompt format that the checkpoint was trained with.
"""

from __future__ import annotations

from pi0_engine.text.files import find_tokenizer
from pi0_engine.text.tokenizer import load_tokenizer

__all__ = ["find_tokenizer", "load_tokenizer"]

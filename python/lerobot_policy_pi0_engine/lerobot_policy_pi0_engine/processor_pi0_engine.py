"""Pre- and post-processors: lerobot's own, under the names by which it looks for those of our types."""

from __future__ import annotations

from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors as make_pi0_engine_pre_post_processors
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors as make_pi05_engine_pre_post_processors

__all__ = ["make_pi0_engine_pre_post_processors", "make_pi05_engine_pre_post_processors"]

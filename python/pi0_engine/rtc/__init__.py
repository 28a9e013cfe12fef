"""Real-time chunking: a new chunk that continues the one in execution (docs/rtc.md).

In: what is left of a robot's chunk, and its delay. Out: what an engine is told, a guide or a fixed prefix.
"""

from __future__ import annotations

from pi0_engine.rtc.schedule import DelayEstimator, Leftover, RtcConfig

__all__ = ["DelayEstimator", "Leftover", "RtcConfig"]

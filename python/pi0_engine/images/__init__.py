"""Camera frames on their way to the network.

In: uint8 frames of any size. Out: pixels as the network sees them, or buffers from which the device makes them.
"""

from __future__ import annotations

from pi0_engine.images.resize import FramePreprocessor

__all__ = ["FramePreprocessor"]

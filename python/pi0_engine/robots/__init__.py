"""A robot's words and the model's: declarations, observations, normalisation, guards (docs/robots.md, docs/safety.md).

In: what a robot sends, and the network's actions. Out: ``ModelInputs``, and actions in the robot's units within its
limits. numpy only: a robot's own computer uses this without torch.
"""

from __future__ import annotations

from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import get_robot

__all__ = ["Robot", "get_robot"]

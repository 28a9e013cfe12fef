"""pi0-engine as lerobot policies. lerobot imports this at start, which registers the types; nothing heavy is loaded."""

from __future__ import annotations

from lerobot_policy_pi0_engine.configuration_pi0_engine import PI0EngineConfig, PI05EngineConfig

__all__ = ["PI0EngineConfig", "PI05EngineConfig"]

"""pi0-engine: a fast, proven inference engine for the π0 and π0.5 robot policies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pi0_engine.torch_needed import torch_needed

if TYPE_CHECKING:
    from pi0_engine.checkpoints.checkpoint import open_checkpoint
    from pi0_engine.config import EngineConfig, Pi0Config
    from pi0_engine.engine.runtime import Engine
    from pi0_engine.inputs import ModelInputs
    from pi0_engine.policy import Pi0Policy

__all__ = ["Engine", "EngineConfig", "ModelInputs", "Pi0Config", "Pi0Policy", "open_checkpoint"]

#: Where each public name lives. It is imported on first use: ``import pi0_engine`` alone does not load torch.
_HOME = {
    "Engine": "pi0_engine.engine.runtime",
    "EngineConfig": "pi0_engine.config",
    "ModelInputs": "pi0_engine.inputs",
    "Pi0Config": "pi0_engine.config",
    "Pi0Policy": "pi0_engine.policy",
    "open_checkpoint": "pi0_engine.checkpoints.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with torch_needed(f"pi0_engine.{name}"):
        value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # from now on an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

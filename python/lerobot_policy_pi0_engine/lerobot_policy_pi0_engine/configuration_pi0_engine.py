"""The policy types ``pi0_engine`` and ``pi05_engine``: lerobot's own options, and which ops the engine uses.

lerobot finds policy classes and processors by this module's name: ``modeling_pi0_engine``, ``processor_pi0_engine``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config


@PreTrainedConfig.register_subclass("pi0_engine")
@dataclass
class PI0EngineConfig(PI0Config):
    """lerobot's ``PI0Config``; ``device`` and ``dtype`` are the engine's too.

    Attributes:
        engine_backend: ``backend`` of :class:`pi0_engine.EngineConfig`.
    """

    engine_backend: str = "auto"


@PreTrainedConfig.register_subclass("pi05_engine")
@dataclass
class PI05EngineConfig(PI05Config):
    """lerobot's ``PI05Config``; ``device`` and ``dtype`` are the engine's too.

    Attributes:
        engine_backend: ``backend`` of :class:`pi0_engine.EngineConfig`.
    """

    engine_backend: str = "auto"

"""What runs beside the robot: a client of the policy server, and a control loop that never waits for a policy.

In: observations at the robot's rate, chunks at the network's. Out: an action for every control step. No torch.
"""

from __future__ import annotations

from pi0_engine.client.connection import PolicyClient
from pi0_engine.client.control import Answer, Request, Step
from pi0_engine.client.errors import ConnectionLost, PolicyError
from pi0_engine.client.runner import ChunkRunner, Stopped
from pi0_engine.client.sources import ChunkSource
from pi0_engine.client.statistics import Statistics

__all__ = [
    "Answer",
    "ChunkRunner",
    "ChunkSource",
    "ConnectionLost",
    "PolicyClient",
    "PolicyError",
    "Request",
    "Statistics",
    "Step",
    "Stopped",
]

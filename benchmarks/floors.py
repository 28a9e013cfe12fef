"""The time that no inference of given lengths can beat on this machine, by stage."""

from __future__ import annotations

from typing import Any

import torch

from pi0_engine.config import Pi0Config
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.measuring.op_calls import record_op_calls


def stage_floors(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype, ceilings: dict[str, float]) -> dict[str, Any]:
    """Per stage and in all: FLOP, bytes of weights, and the time in ms that neither of them can be beaten in.

    Activations count nothing: in principle they never leave the cache. That makes the floor lower, never higher.
    """
    flops: dict[str, float] = {}
    read: dict[str, float] = {}
    for op_call in record_op_calls(config, plan, dtype):
        stage = op_call.call.stage
        flops[stage] = flops.get(stage, 0.0) + op_call.call.cost.flops
        read[stage] = read.get(stage, 0.0) + op_call.weight_bytes
    out: dict[str, Any] = {
        stage: {
            "flops": flops[stage],
            "weight_bytes": read[stage],
            "floor_ms": 1e3 * max(flops[stage] / ceilings["flops_per_s"], read[stage] / ceilings["bytes_per_s"]),
        }
        for stage in flops
    }
    return {
        **out,
        "total": {key: sum(row[key] for row in out.values()) for key in ("flops", "weight_bytes", "floor_ms")},
    }

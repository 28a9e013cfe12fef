"""What is left of a robot's chunk, as the network is told about it: robot units in, the engine's continuation out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.config import Pi0Config
from pi0_engine.robots.transforms import Context, ObservationTransform
from pi0_engine.rtc.guidance import Continuation, FixedPrefix, Guide, check_per_token_time
from pi0_engine.rtc.schedule import Leftover, RtcConfig, prefix_weights


def check_mode(rtc: RtcConfig, config: Pi0Config) -> None:
    """Raise ValueError saying why the model cannot continue chunks in this mode."""
    if rtc.mode == "trained":
        try:
            check_per_token_time(config)
        except ValueError as error:
            raise ValueError(f"rtc mode is 'trained', expected 'guided': {error}") from error


def continue_chunks(
    leftovers: Sequence[Leftover | None],
    rtc: RtcConfig,
    transform: ObservationTransform,
    context: Context,
    horizon: int,
) -> tuple[Continuation | None, list[dict[str, Any]]]:
    """The engine's continuation of B leftovers, and what was made of each.

    Actions relative to the state are anchored anew: to ``context``, whose observations the new chunks answer. The
    execution horizon ends with what is left, so nothing is ever pulled towards padding, and begins no earlier than the
    delay: what will have been executed is certain.

    Args:
        leftovers: one per observation, None where there is nothing to continue.
        horizon: actions of the new chunks.

    Returns:
        The continuation, or None where nothing pulls (in trained mode a prefix of no rows: the same graph then serves
        first chunks and others). Of each observation: ``used``, whether the leftover makes a difference; ``delay``, no
        more than is left; ``leftover``, how many of its actions lie within the horizon.

    Raises:
        ValueError: actions of another robot.
    """
    if rtc.mode == "guided" and all(leftover is None for leftover in leftovers):
        return None, [{"used": False, "delay": 0, "leftover": 0} for _ in leftovers]
    lengths = [0 if leftover is None else min(len(leftover), horizon) for leftover in leftovers]
    delays = [min(leftover.delay, n) if leftover else 0 for leftover, n in zip(leftovers, lengths, strict=True)]
    previous = _encode(leftovers, lengths, transform, context, horizon)
    if rtc.mode == "trained":
        used = [{"used": delay > 0, "delay": delay, "leftover": n} for delay, n in zip(delays, lengths, strict=True)]
        return FixedPrefix(previous, tuple(delays)), used
    weights = np.stack(
        [
            prefix_weights(rtc.schedule, delay, min(max(rtc.execution_horizon, delay), n), horizon)
            for n, delay in zip(lengths, delays, strict=True)
        ]
    )
    used = [
        {"used": bool(row.any()), "delay": delay, "leftover": n}
        for row, delay, n in zip(weights, delays, lengths, strict=True)
    ]
    if not weights.any():
        return None, used
    return Guide(previous, weights, float(rtc.max_guidance_weight)), used


def _encode(
    leftovers: Sequence[Leftover | None],
    lengths: Sequence[int],
    transform: ObservationTransform,
    context: Context,
    horizon: int,
) -> NDArray[np.float32]:
    """float32 [B, H, action_dim] in network units, zeros behind what is left."""
    width = transform.robot.action_dim
    given = np.zeros((len(leftovers), horizon, width))
    for row, leftover, n in zip(given, leftovers, lengths, strict=True):
        if leftover is not None:
            if leftover.actions.shape[1] != width:
                shape = list(leftover.actions.shape)
                raise ValueError(f"leftover actions have shape {shape}, expected [L, {width}]")
            row[:n] = leftover.actions[:n]
    encoded = transform.encode_actions(given, context)
    for row, n in zip(encoded, lengths, strict=True):
        row[n:] = 0
    return encoded

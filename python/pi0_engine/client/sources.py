"""Where a control loop's chunks come from: a policy in this process, or one behind a websocket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from pi0_engine.client.connection import PolicyClient
from pi0_engine.client.control import Answer, Request
from pi0_engine.client.declared import robot_of
from pi0_engine.client.errors import ConnectionLost
from pi0_engine.robots.guards import check, check_age
from pi0_engine.rtc.schedule import Leftover

logger = logging.getLogger(__name__)


@runtime_checkable
class ChunkSource(Protocol):
    """What a runner asks of a policy. Both methods are called from the inference thread alone, and may block."""

    def ready(self) -> None:
        """Return when a request can be made: called after one has failed. Raises what keeps it from being so."""

    def chunk(self, request: Request) -> Answer:
        """The actions for an observation. Raises whatever went wrong; the runner then asks with a newer one."""


class LocalSource:
    """A policy in this process. Its robot's guards are applied here, as a server would.

    Args:
        policy: a ``Pi0Policy`` or ``RecordingPolicy``; without ``rtc`` anything with
            ``infer(observation) -> {"actions": [H, A], ...}``, whose guards are its own business.
        rtc: continue the chunk in execution, unless the policy cannot.
        clock: the one of the runner that asks.
    """

    def __init__(self, policy: Any, *, rtc: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._rtc = rtc and _can_continue(getattr(policy, "no_rtc", None))
        self._robot = robot_of(policy)

    def ready(self) -> None:
        pass

    def chunk(self, request: Request) -> Answer:
        """As :meth:`ChunkSource.chunk`. Raises GuardViolation where the robot's guards refuse."""
        if request.new_episode and hasattr(self._policy, "reset"):
            self._policy.reset()
        options = {"leftover": leftover(request)} if self._rtc else {}
        robot = self._robot
        if robot is None:
            return Answer(self._policy.infer(request.observation, **options)["actions"])
        check_age(1e3 * (self._clock() - request.observed_at), robot.guards)
        reply = self._policy.infer(request.observation, **options)
        report = check(reply["actions"], reply["state"], robot.guards, robot.control_hz)
        return Answer(report.actions, guarded=report.applied)


class RemoteSource:
    """A policy behind a websocket.

    Args:
        client: connected.
        rtc: continue the chunk in execution; a server that is not pi0-engine's cannot, and one of ours says if not.
        clock: the one of the runner that asks.
    """

    def __init__(self, client: PolicyClient, *, rtc: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        self._rtc = rtc and _can_continue(None if client.metadata.get("rtc", "guided") else "the server says so")

    def ready(self) -> None:
        self._client.connect()

    def chunk(self, request: Request) -> Answer:
        if not self._client.connected:  # connecting may take long; the runner then takes a newer observation
            raise ConnectionLost(f"the connection to {self._client.uri} broke between two requests")
        if request.new_episode:
            self._client.reset()
        age_ms = 1e3 * max(0.0, self._clock() - request.observed_at)
        left_ms = None if request.max_age_s is None else max(0.0, 1e3 * request.max_age_s - age_ms)
        reply = self._client.infer(request.observation, age_ms=age_ms, deadline_ms=left_ms, rtc=self._continue(request))
        session, guards = reply.get("session"), reply.get("guards")
        return Answer(
            reply["actions"],
            (session["id"], session["sequence"]) if isinstance(session, dict) else None,
            guards["applied"] if isinstance(guards, dict) else "none",
        )

    def _continue(self, request: Request) -> dict[str, int] | None:
        previous = request.previous
        if not self._rtc or previous is None or previous.name is None:
            return None
        session, sequence = previous.name
        if session != self._client.session:
            return None  # the server that remembered the chunk is gone, or the session with it
        return {"executed": request.executed, "delay": request.delay, "sequence": sequence}


def _can_continue(why_not: str | None) -> bool:
    """Say it where chunks that should continue each other will not."""
    if why_not is not None:
        logger.warning("chunks will not continue each other (rtc): %s", why_not)
    return why_not is None


def leftover(request: Request) -> Leftover | None:
    """What is left of the chunk in execution, in the form that ``Pi0Policy.infer`` takes."""
    if request.previous is None:
        return None
    rest = request.previous.actions[request.executed :]
    return Leftover(rest, min(request.delay, len(rest)))


def as_source(policy: Any, *, rtc: bool, clock: Callable[[], float]) -> ChunkSource:
    """A policy of any kind that a runner takes, as what it asks.

    Raises:
        ValueError: an object with neither ``chunk`` nor ``infer``.
    """
    if isinstance(policy, ChunkSource):
        return policy
    if isinstance(policy, PolicyClient):
        return RemoteSource(policy, rtc=rtc, clock=clock)
    if callable(getattr(policy, "infer", None)):
        return LocalSource(policy, rtc=rtc, clock=clock)
    raise ValueError(f"the policy is {policy!r}, expected a Pi0Policy, a PolicyClient or a ChunkSource")

"""Guards: what a robot declares about actions that it must never be sent, checked on whole chunks (docs/safety.md).

Nothing is limited that the robot's declaration does not limit. NaN and infinity are refused always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

OnViolation = Literal["refuse", "clip", "hold"]
Kind = Literal["limit", "velocity", "jump", "not_finite", "unreachable", "observation_age"]

#: Violations that a reply spells out. The rest is in ``count``: a chunk of 50 actions of 32 numbers may break 1600.
MAX_REPORTED = 16


@dataclass(frozen=True)
class Guards:
    """Limits of one robot's actions, in robot units, one entry per action dimension; None leaves a dimension free.

    Attributes:
        on_violation: ``refuse`` the chunk; ``clip`` it to the nearest one that keeps every guard, step after step; or
            ``hold``: from the first step that breaks a guard on, repeat the action before it, or the state if that is
            the first step. ``hold`` repeats positions, so it needs ``max_jump`` for every dimension.
        limits: (lowest, highest) of each dimension.
        max_velocity: units per second between consecutive actions of a chunk. Needs the robot's ``control_hz``.
        max_jump: largest distance of the first action from the state. Says that action dimension i is a position in
            the units of state dimension i; leave it out for velocities and for actions relative to the state.
        max_observation_age_ms: older observations are refused, whatever ``on_violation`` says.

    Raises:
        ValueError: no limit at all, or one that is not usable, named with its dimension.
    """

    on_violation: OnViolation = "refuse"
    limits: tuple[tuple[float, float] | None, ...] | None = None
    max_velocity: tuple[float | None, ...] | None = None
    max_jump: tuple[float | None, ...] | None = None
    max_observation_age_ms: float | None = None

    def __post_init__(self) -> None:
        if self.on_violation not in get_args(OnViolation):
            raise ValueError(f"on_violation is {self.on_violation!r}, expected one of {list(get_args(OnViolation))}")
        if all(getattr(self, field.name) is None for field in dataclasses.fields(self) if field.default is None):
            raise ValueError("guards without any limit, expected limits, max_velocity, max_jump or an observation age")
        for dim, pair in enumerate(self.limits or ()):
            if pair is not None and (len(pair) != 2 or not _finite(*pair) or not pair[0] < pair[1]):
                raise ValueError(f"limits[{dim}] is {pair!r}, expected two finite numbers, the lower first, or null")
        for name in ("max_velocity", "max_jump"):
            for dim, value in enumerate(getattr(self, name) or ()):
                if value is not None and not (_finite(value) and value > 0):
                    raise ValueError(f"{name}[{dim}] is {value!r}, expected a finite number above 0, or null")
        age = self.max_observation_age_ms
        if age is not None and not (_finite(age) and age > 0):
            raise ValueError(f"max_observation_age_ms is {age!r}, expected milliseconds above 0")

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers, text and None only: for a reply, a recording or a robot file."""
        return {
            "on_violation": self.on_violation,
            "limits": self.limits and [None if pair is None else list(pair) for pair in self.limits],
            "max_velocity": self.max_velocity and list(self.max_velocity),
            "max_jump": self.max_jump and list(self.max_jump),
            "max_observation_age_ms": self.max_observation_age_ms,
        }

    def validate(self, action_dim: int, state_dim: int, control_hz: float | None) -> None:
        """Whether these are the guards of a robot with such actions, state and control rate. Raises ValueError."""
        for name in ("limits", "max_velocity", "max_jump"):
            given = getattr(self, name)
            if given is not None and len(given) != action_dim:
                raise ValueError(f"guards.{name} has {len(given)} entries, expected {action_dim}, one per dimension")
        if self.max_velocity is not None and control_hz is None:
            raise ValueError("guards.max_velocity is per second: it needs control_hz, the actions per second")
        if control_hz is not None and not (_finite(control_hz) and control_hz > 0):
            raise ValueError(f"control_hz is {control_hz!r}, expected actions per second, above 0")
        beyond = [dim for dim, jump in enumerate(self.max_jump or ()) if jump is not None and dim >= state_dim]
        if beyond:
            raise ValueError(
                f"guards.max_jump is given for action dimensions {beyond}, but the state has {state_dim} numbers: "
                "it compares an action with the state of the same index"
            )
        if self.on_violation == "hold":
            free = [dim for dim in range(action_dim) if self.max_jump is None or self.max_jump[dim] is None]
            if free:
                raise ValueError(
                    f"guards.on_violation is 'hold', which repeats positions, but dimensions {free} have no max_jump "
                    "that says they are positions; expected max_jump for every dimension, or 'refuse' or 'clip'"
                )


@dataclass(frozen=True)
class Violation:
    """One number that breaks a guard.

    Attributes:
        kind: ``limit``; ``velocity`` (units/s from the action before); ``jump`` (distance of the first action from the
            state); ``not_finite``; ``observation_age`` (ms). ``unreachable``: an action that was sent although it is
            outside its limits, because the robot's state is, and the way back takes more steps.
        dim, step: which number of which action of the chunk; None where it is about no action.
        value: what was found.
        limit: the bound that it breaks.
    """

    kind: Kind
    dim: int | None
    step: int | None
    value: float
    limit: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        where = "" if self.dim is None else f" of dimension {self.dim} at step {self.step}"
        return f"{self.kind}{where}: {self.value:.6g}, limit {self.limit:.6g}"


class GuardViolation(ValueError):
    """Actions that are not given to the robot.

    Attributes:
        code: ``guard_violation``, ``not_finite`` or ``stale_observation``: what a server puts into its error.
        violations: all of them, in the order of the steps.
    """

    def __init__(self, code: str, violations: tuple[Violation, ...]) -> None:
        more = f", and {len(violations) - 1} more" if len(violations) > 1 else ""
        super().__init__(f"refused by the guards: {violations[0]}{more}")
        self.code, self.violations = code, violations


@dataclass(frozen=True, eq=False)
class GuardReport:
    """A chunk that may be sent.

    Attributes:
        actions: [H, A]. The very array that was given if nothing was violated.
        applied: what was done to it.
        violations: of the chunk as the policy gave it, in the order of its steps, then what clip or hold could not
            mend (``unreachable``).
    """

    actions: NDArray[np.floating[Any]]
    applied: Literal["none", "clip", "hold"] = "none"
    violations: tuple[Violation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a reply: plain numbers and text, the first 16 violations and how many there are."""
        listed = [violation.to_dict() for violation in self.violations[:MAX_REPORTED]]
        return {"applied": self.applied, "violations": listed, "count": len(self.violations)}


def check(
    actions: NDArray[np.floating[Any]], state: ArrayLike, guards: Guards | None, control_hz: float | None = None
) -> GuardReport:
    """Hold a chunk against the guards and do what they say.

    Bounds are compared in the dtype of the actions: a float32 action may be at the float32 nearest to its limit.

    Args:
        actions: float [H, A], absolute, in robot units, as ``Pi0Policy.infer`` returns one chunk. Not modified.
            Several candidates are checked one by one: of which one the robot will take, only its caller knows.
        state: [S] in robot units, from the observation that the chunk answers.
        guards: None checks for NaN and infinity only.
        control_hz: actions per second.

    Raises:
        GuardViolation: NaN or infinity; a violation where the guards refuse.
        ValueError: shapes that are not those of one chunk, or guards for another robot.
    """
    if actions.ndim != 2 or len(actions) == 0 or not np.issubdtype(actions.dtype, np.floating):
        raise ValueError(f"actions are {actions.dtype} {list(actions.shape)}, expected one chunk, float [H, A]")
    _refuse_not_finite(actions)
    if guards is None:
        return GuardReport(actions)
    with np.errstate(over="ignore"):  # a bound beyond the dtype is no bound
        position = np.asarray(state).astype(actions.dtype)
        if position.ndim != 1 or not np.isfinite(position).all():
            raise ValueError(f"state is {position.tolist()}, expected one state [S] of finite numbers")
        guards.validate(actions.shape[1], len(position), control_hz)
        bounds = _Bounds.of(guards, control_hz, position, actions)
        found = tuple(bounds.violations(actions))
        if not found:
            return GuardReport(actions)
        if guards.on_violation == "refuse":
            raise GuardViolation("guard_violation", found)
        if guards.on_violation == "clip":
            safe = bounds.clip(actions)
        else:
            safe = actions.copy()
            first = min(violation.step or 0 for violation in found)
            safe[first:] = safe[first - 1] if first else position[: actions.shape[1]]
        unreachable = tuple(dataclasses.replace(v, kind="unreachable") for v in bounds.violations(safe))
    return GuardReport(safe, guards.on_violation, found + unreachable)


def largest_steps(max_velocity: Iterable[float | None], control_hz: float, dtype: DTypeLike) -> NDArray[Any]:
    """[A] of this dtype: the largest change from one action to the next that keeps ``max_velocity``; inf where free."""
    return np.array([np.inf if v is None else v / control_hz for v in max_velocity], dtype)


def check_age(age_ms: float, guards: Guards | None) -> None:
    """Refuse an observation that is older than the guards allow, whatever they do otherwise. Raises GuardViolation."""
    oldest = None if guards is None else guards.max_observation_age_ms
    if oldest is not None and not age_ms <= oldest:  # not: NaN is too old as well
        raise GuardViolation("stale_observation", (Violation("observation_age", None, None, float(age_ms), oldest),))


@dataclass(frozen=True, eq=False)
class _Bounds:
    """The guards as arrays [A] of the actions' dtype: infinite where nothing is limited."""

    guards: Guards
    control_hz: float
    low: NDArray[Any]
    high: NDArray[Any]
    step: NDArray[Any]
    jump: NDArray[Any]
    origin: NDArray[Any]

    @classmethod
    def of(cls, guards: Guards, control_hz: float | None, state: NDArray[Any], actions: NDArray[Any]) -> _Bounds:
        dims, dtype = actions.shape[1], actions.dtype
        rate = 1.0 if control_hz is None else control_hz
        free = (None,) * dims
        low, high = np.array([pair or (-np.inf, np.inf) for pair in guards.limits or free], dtype).T
        step = largest_steps(guards.max_velocity or free, rate, dtype)
        jump = np.array([np.inf if j is None else j for j in guards.max_jump or free], dtype)
        origin = np.zeros(dims, dtype)  # dimensions beyond the state have no jump limit: any finite value does
        origin[: len(state)] = state[:dims]
        return cls(guards, rate, low, high, step, jump, origin)

    def violations(self, actions: NDArray[Any]) -> Iterator[Violation]:
        """In the order of the steps. The expressions are those of :meth:`clip`, so that the two agree to the bit."""
        before, after = actions[:-1], actions[1:]
        outside = (actions < self.low) | (actions > self.high)
        jumps, fast = np.zeros_like(outside), np.zeros_like(outside)
        jumps[0] = (actions[0] < self.origin - self.jump) | (actions[0] > self.origin + self.jump)
        fast[1:] = (after < before - self.step) | (after > before + self.step)
        limits, max_jump, max_velocity = self.guards.limits, self.guards.max_jump, self.guards.max_velocity
        for k, d in np.argwhere(outside | jumps | fast).tolist():
            value = float(actions[k, d])
            pair = limits[d] if limits is not None and outside[k, d] else None
            if pair is not None:
                yield Violation("limit", d, k, value, pair[0] if value < self.low[d] else pair[1])
            allowed = max_jump[d] if max_jump is not None and jumps[k, d] else None
            if allowed is not None:
                yield Violation("jump", d, k, abs(value - float(self.origin[d])), allowed)
            allowed = max_velocity[d] if max_velocity is not None and fast[k, d] else None
            if allowed is not None:
                yield Violation("velocity", d, k, abs(value - float(actions[k - 1, d])) * self.control_hz, allowed)

    def clip(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Each action brought into its limits, then to within one step of the action before it, as it was sent.

        Limits first: a robot outside of them is led back as fast as a step allows, and no faster. From inside, both
        hold: the action before is inside the limits, so is whatever lies between it and an action inside.
        """
        safe = actions.copy()
        for k, wanted in enumerate(actions):
            before, reach = (safe[k - 1], self.step) if k else (self.origin, self.jump)
            inside = _within(wanted, self.low, self.high)
            safe[k] = _within(inside, before - reach, before + reach)
        return safe


def _within(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[Any]:
    """Like ``np.clip``, which may turn -0.0 into 0.0: values inside stay as they are, bit for bit."""
    return np.where(values < low, low, np.where(values > high, high, values))


def _refuse_not_finite(actions: NDArray[Any]) -> None:
    if not np.isfinite(actions).all():
        found = np.argwhere(~np.isfinite(actions))
        largest = float(np.finfo(actions.dtype).max)
        wrong = (Violation("not_finite", int(d), int(k), float(actions[k, d]), largest) for k, d in found)
        raise GuardViolation("not_finite", tuple(wrong))


def _finite(*values: float) -> bool:
    """Also as float32: a limit of 1e300 would become infinity."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.array(values, np.float64).astype(np.float32)).all())

"""The op contract: every op has one meaning (a torch function), its implementations, its cost, in one place.

The stages in ``engine/`` call ops only through :class:`Ops`, with preallocated outputs. Which implementation of an op
runs is decided once, when :func:`select_ops` builds that table, and is kept there for ``pi0-engine env`` to print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

OpFunction = Callable[..., None]


@dataclass(frozen=True)
class Cost:
    """Arithmetic operations (a multiply-add counts two) and bytes that must cross memory at least once."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Op:
    """An operation of the engine.

    Attributes:
        meaning: the torch function that defines the op; it is also its implementation ``"torch"``.
        cost: takes the same arguments as ``meaning`` and returns its :class:`Cost` from shapes alone.
        implementations: further ones by name. Each is a function with the meaning's signature.
        unavailable: by implementation name, a function of the device that returns why it cannot run there, or None.
    """

    name: str
    meaning: OpFunction
    cost: Callable[..., Cost]
    implementations: Mapping[str, OpFunction]
    unavailable: Mapping[str, Callable[[torch.device], str | None]]


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op was chosen, and why."""

    op: str
    implementation: str
    reason: str


REGISTRY: dict[str, Op] = {}


def op(cost: Callable[..., Cost]) -> Callable[[OpFunction], OpFunction]:
    """Register the decorated torch function as the meaning of a new op of the same name."""

    def register(meaning: OpFunction) -> OpFunction:
        name = meaning.__name__
        assert name not in REGISTRY, f"op {name} is registered twice"
        REGISTRY[name] = Op(name, meaning, cost, {}, {})
        return meaning

    return register


class Ops:
    """The chosen function of every op, as attributes: ``ops.linear_residual(...)``."""

    def __init__(self, functions: Mapping[str, OpFunction], choices: tuple[Choice, ...]) -> None:
        self._functions = dict(functions)
        self.choices = choices

    def __getattr__(self, name: str) -> OpFunction:
        functions = self.__dict__.get("_functions", {})  # empty while copy or pickle makes an instance
        if name not in functions:
            raise AttributeError(f"there is no op {name!r}; the ops are {sorted(functions)}")
        return functions[name]


def all_ops() -> Mapping[str, Op]:
    """Every op of the engine, {name: Op}."""
    from pi0_engine.kernels import attention, linear, norm_linear, patch  # noqa: F401  (importing registers)

    return REGISTRY


def select_ops(backend: str, device: torch.device) -> Ops:
    """Choose an implementation of every op.

    ``"torch"`` takes the meanings. ``"auto"`` takes the fastest available implementation of each op and records why
    the others were passed over.

    Raises:
        ValueError: a named backend that does not exist or is unavailable on ``device``, with the reason.
    """
    functions: dict[str, OpFunction] = {}
    choices = []
    for name, entry in all_ops().items():
        chosen, reason = "torch", "asked for by name"
        if backend == "auto":
            refused = [f"{other}: {why}" for other in entry.implementations if (why := _why_not(entry, other, device))]
            usable = [other for other in entry.implementations if not _why_not(entry, other, device)]
            chosen = usable[0] if usable else "torch"
            reason = "; ".join(refused) or ("fastest available" if usable else "the only implementation")
        elif backend != "torch":
            why = _why_not(entry, backend, device)
            if why is not None:
                raise ValueError(f"backend {backend!r} cannot run op {name!r} on {device}: {why}")
            chosen = backend
        functions[name] = entry.meaning if chosen == "torch" else entry.implementations[chosen]
        choices.append(Choice(name, chosen, reason))
    return Ops(functions, tuple(choices))


def _why_not(entry: Op, implementation: str, device: torch.device) -> str | None:
    if implementation not in entry.implementations:
        return f"it has no such implementation (it has {['torch', *entry.implementations]})"
    return entry.unavailable[implementation](device)


def nbytes(*tensors: Any) -> int:
    """Bytes of the given tensors; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)

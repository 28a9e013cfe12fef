"""The op contract: every op has one meaning (a torch function), its implementations, its cost, in one place.

The stages in ``engine/`` call ops only through :class:`Ops`, with preallocated outputs. Which implementation of an op
runs is decided once, when :func:`select_ops` builds that table, and is kept there for ``pi0-engine env`` to print.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pi0_engine.kernels.availability import UNAVAILABLE
from pi0_engine.kernels.gpu.configs import configs_for
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.gpu.target import target_of

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
        implementations: further ones, fastest first: {name: module under ``pi0_engine.kernels``}, which holds a
            function of the op's name. It takes a :class:`Launcher`, then the meaning's arguments.
    """

    name: str
    meaning: OpFunction
    cost: Callable[..., Cost]
    implementations: Mapping[str, str]

    def load(self, implementation: str, launcher: Launcher | None) -> OpFunction:
        """The function to call; modules of implementations are imported only here, because they need packages."""
        if implementation == "torch":
            return self.meaning
        module = importlib.import_module(f"pi0_engine.kernels.{self.implementations[implementation]}")
        return functools.partial(getattr(module, self.name), launcher)


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op was chosen, and why."""

    op: str
    implementation: str
    reason: str


REGISTRY: dict[str, Op] = {}

#: Implementations that a :class:`Launcher` does not concern.
_WITHOUT_LAUNCHER = ("torch", "cuda", "cpp")


def op(cost: Callable[..., Cost], **implementations: str) -> Callable[[OpFunction], OpFunction]:
    """Register the decorated torch function as the meaning of a new op of the same name.

    ``implementations`` are the others, as in :attr:`Op.implementations`: ``triton="gpu.linear"``.
    """

    def register(meaning: OpFunction) -> OpFunction:
        name = meaning.__name__
        assert name not in REGISTRY, f"op {name} is registered twice"
        assert set(implementations) <= set(UNAVAILABLE), implementations
        REGISTRY[name] = Op(name, meaning, cost, implementations)
        return meaning

    return register


class Ops:
    """The chosen function of every op, as attributes: ``ops.linear_residual(...)``.

    ``launcher`` is what the implementations on a GPU launch with; None where none was chosen.
    """

    def __init__(
        self, functions: Mapping[str, OpFunction], choices: tuple[Choice, ...], launcher: Launcher | None = None
    ) -> None:
        self._functions = dict(functions)
        self.choices, self.launcher = choices, launcher

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Around the calls of a stage or a layer; a profiler sees the name (``ranges.py``)."""
        return nullcontext()

    def __getattr__(self, name: str) -> OpFunction:
        functions = self.__dict__.get("_functions", {})  # empty while copy or pickle makes an instance
        if name not in functions:
            raise AttributeError(f"there is no op {name!r}; the ops are {sorted(functions)}")
        return functions[name]


def all_ops() -> Mapping[str, Op]:
    """Every op of the engine, {name: Op}."""
    from pi0_engine.kernels import attention, frames, linear, norm_linear, patch  # noqa: F401  (importing registers)

    return REGISTRY


def select_ops(
    backend: str,
    device: torch.device,
    launcher: Launcher | None = None,
    prefer: Mapping[str, str] | None = None,
) -> Ops:
    """Choose an implementation of every op.

    ``"torch"`` takes the meanings. ``"auto"`` takes the first available implementation of each op and records why
    the others were passed over; so does an op that has none by the backend's name. ``prefer`` names another
    implementation for single ops, {op: implementation}. ``launcher`` replaces the one for the GPU at hand.

    Raises:
        ValueError: a named implementation that does not exist or is unavailable on ``device``, with the reason.
    """
    prefer = prefer or {}
    for name in prefer:
        if name not in all_ops():
            raise ValueError(f"there is no op {name!r}; the ops are {sorted(all_ops())}")
    choices = tuple(
        _choose(entry, prefer.get(name) or _wanted(entry, backend), device) for name, entry in all_ops().items()
    )
    if launcher is None and any(choice.implementation not in _WITHOUT_LAUNCHER for choice in choices):
        target = target_of(device)
        launcher = Launcher(target, configs_for(target.arch)[0], concurrent=device.type != "cpu")
    functions = {choice.op: all_ops()[choice.op].load(choice.implementation, launcher) for choice in choices}
    return Ops(functions, choices, launcher)


def _wanted(entry: Op, backend: str) -> str:
    """``backend``, or "auto" for an op that another tool suits better: frames are not resized in Triton."""
    return "auto" if backend in UNAVAILABLE and backend not in entry.implementations else backend


def _choose(entry: Op, wanted: str, device: torch.device) -> Choice:
    if wanted == "torch":
        return Choice(entry.name, "torch", "asked for by name")
    if wanted != "auto":
        why = _why_not(entry, wanted, device)
        if why is not None:
            raise ValueError(f"backend {wanted!r} cannot run op {entry.name!r} on {device}: {why}")
        return Choice(entry.name, wanted, "asked for by name")
    refused: list[str] = []
    for name in entry.implementations:
        # The interpreter is for tests: nobody gets it without asking.
        interpreted = name == "triton" and device.type == "cpu"
        why = "it is for GPUs" if interpreted else _why_not(entry, name, device)
        if why is None:
            return Choice(entry.name, name, "; ".join([*refused, "fastest available"]))
        refused.append(f"{name}: {why}")
    return Choice(entry.name, "torch", "; ".join(refused) or "the only implementation")


def _why_not(entry: Op, implementation: str, device: torch.device) -> str | None:
    if implementation not in entry.implementations:
        return f"it has no such implementation (it has {['torch', *entry.implementations]})"
    return UNAVAILABLE[implementation](device)


def nbytes(*tensors: Any) -> int:
    """Bytes of the given tensors; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)

"""The stages in order. The same few lines run on real buffers, under a tracer that only counts, or in a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pi0_engine.config import Pi0Config
from pi0_engine.engine import flow, prefix, vision
from pi0_engine.engine.plan import Workspace
from pi0_engine.engine.time_terms import StepTerms
from pi0_engine.engine.weights import Weights
from pi0_engine.kernels.registry import Ops

STAGES = ("vision", "prefix", "flow")


def run(
    ops: Ops,
    config: Pi0Config,
    weights: Weights,
    steps: Sequence[StepTerms],
    space: Workspace,
    lap: Callable[[str], None],
) -> None:
    """From ``patches``, ``prompt``, ``state``, a chunk to continue and noise in ``actions`` to actions in ``actions``.

    ``lap`` is called with its name when a stage has been issued.
    """
    observe(ops, config, weights, space, lap)
    sample(ops, config, weights, steps, space, lap)


def observe(ops: Ops, config: Pi0Config, weights: Weights, space: Workspace, lap: Callable[[str], None]) -> None:
    """``patches`` and ``prompt`` -> keys and values of the prefix."""
    with ops.range("vision"):
        vision.embed_images(ops, config.vision, weights.vision, space)
    lap("vision")
    with ops.range("prefix"):
        prefix.prefill(ops, config.llm, weights.llm, space)
    lap("prefix")


def sample(
    ops: Ops,
    config: Pi0Config,
    weights: Weights,
    steps: Sequence[StepTerms],
    space: Workspace,
    lap: Callable[[str], None],
) -> None:
    """Keys and values of the prefix, ``state`` and noise in ``actions`` -> actions in ``actions``."""
    with ops.range("flow"):
        flow.integrate(ops, config.expert, weights.action, weights.expert, steps, space)
    lap("flow")

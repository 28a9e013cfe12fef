"""Settings of the whole suite: large tests are opt-in, hypothesis draws the same examples always.

hypothesis may be missing: what runs on a GPU does without it. So may torch: a robot's side does without it
(test_without_torch.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from pi0_engine.torch_needed import has_torch
from tests.support.longest import LONGEST
from tests.support.paths import TESTS

try:
    import hypothesis
except ImportError:
    hypothesis = None  # type: ignore[assignment]

# Without a GPU the Triton kernels run in Triton's interpreter; each decides so when its module is imported.
if has_torch():
    import torch

    from pi0_engine.kernels import gemm
    from tests.support import op_checks

if not has_torch() or not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

FULL_SIZE = (
    "published sizes: up to 15 GB of memory and some minutes each; run them with `pytest -m full_size`"
    " (`make test-full`)"
)

# Derandomized: a failure on one machine is the same on every machine. No deadline: machines are shared.
if hypothesis is not None:
    hypothesis.settings.register_profile("pi0_engine", derandomize=True, deadline=None, max_examples=25, database=None)
    hypothesis.settings.load_profile("pi0_engine")

_left_out: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"full_size: {FULL_SIZE}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.has_plugin("randomly"):
        names = [item.path.relative_to(TESTS).as_posix() for item in items]
        order = {name: place for place, name in enumerate(LONGEST)}
        ranked = sorted(zip(names, items, strict=True), key=lambda pair: order.get(pair[0], len(LONGEST)))
        items[:] = [item for _, item in ranked]
    if "full_size" in config.option.markexpr:
        return
    large = [item for item in items if item.get_closest_marker("full_size")]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]
        _left_out.extend(item.nodeid for item in large)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} tests left out, {FULL_SIZE}")


@pytest.fixture(autouse=True)
def any_order() -> Iterator[None]:
    """A test draws the same numbers whatever ran before it, and leaves no level of logging behind."""
    if has_torch():
        op_checks.begin()
    loggers = [logging.getLogger(), logging.getLogger("pi0_engine")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 widened"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Every way in which a CPU computes: bfloat16 as itself, or widened where that is faster."""
    name, _, widened = request.param.partition(" ")
    monkeypatch.setattr(gemm, "cpu_computes_bfloat16", lambda: not widened)
    return getattr(torch, name)

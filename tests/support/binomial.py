"""How many of some episodes must end well, if a policy succeeds as often as was measured. For tests to import.

In closed loop one rounding decides an episode near an edge, and roundings differ between processors. A count over
several scenes with a bound that a correct policy meets with probability 0.9999 holds on all of them.
"""

from __future__ import annotations

import json
from typing import Any

from scipy.stats import binom

from pi0_engine.demo.evaluate import wilson_interval
from tests.support.paths import ROOT

_RESULTS = ROOT / "docs" / "closed_loop_results.json"
_MISSED_BY_CORRECT = 1e-4


def least(episodes: int, rate: float) -> int:
    """The most successes that can be asked of ``episodes`` which each succeed with probability ``rate``."""
    return max(k for k in range(episodes + 1) if binom.sf(k - 1, episodes, rate) >= 1 - _MISSED_BY_CORRECT)


def most(episodes: int, rate: float) -> int:
    """The fewest events that must be allowed where each of ``episodes`` brings one with probability ``rate``."""
    return episodes - least(episodes, 1 - rate)


def measured() -> dict[str, Any]:
    """What docs/closed_loop.md reports, by ``python -m pi0_engine.demo.report``."""
    results: dict[str, Any] = json.loads(_RESULTS.read_text())
    return results


def low(successes: int, episodes: int) -> float:
    """The rate that was measured, at the lower end of its 95 % interval."""
    return wilson_interval(successes, episodes)[0]

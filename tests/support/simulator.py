"""Skips what needs the simulator where it cannot render. With ``PI0_REQUIRE_SIMULATOR=1``, as in CI, that fails."""

from __future__ import annotations

import functools
import os

import pytest

from pi0_engine.demo.scene import load_simulator


@functools.cache
def why_not() -> str:
    try:
        load_simulator()
    except ValueError as error:
        return str(error)
    return ""


if os.environ.get("PI0_REQUIRE_SIMULATOR") == "1" and why_not():
    raise RuntimeError(f"PI0_REQUIRE_SIMULATOR is 1, and there is no simulator: {why_not()}")
needs_simulator = pytest.mark.skipif(bool(why_not()), reason=why_not() or "the simulator works")

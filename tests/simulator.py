"""Skips what needs the simulator where it cannot render."""

from __future__ import annotations

import functools

import pytest

from pi0_engine.demo.scene import load_simulator


@functools.cache
def _why_not() -> str:
    try:
        load_simulator()
    except ValueError as error:
        return str(error)
    return ""


needs_simulator = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "the simulator works")

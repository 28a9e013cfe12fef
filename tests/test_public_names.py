"""What README and docs import can be imported from where they say it is."""

from __future__ import annotations

import importlib
import re

import pytest

import pi0_engine
from tests.support.paths import ROOT

#: ``from MODULE import NAMES`` of the project, in blocks of Python.
_IMPORT = re.compile(r"^\s*from (pi0_engine[\w.]*) import ([\w, ]+)$", re.MULTILINE)
SHOWN = sorted(
    {
        (module, name.strip())
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for module, names in _IMPORT.findall(block)
        for name in names.split(",")
    }
)


def test_documents_show_some() -> None:
    assert len(SHOWN) > 15 and ("pi0_engine", "Pi0Policy") in SHOWN


@pytest.mark.parametrize(("module", "name"), SHOWN)
def test_what_is_shown_is_there(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("name", pi0_engine.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(pi0_engine, name).__name__ == name


def test_a_name_that_is_not_public() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Pi0Polisy'"):
        _ = pi0_engine.Pi0Polisy

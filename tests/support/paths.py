"""Where things lie."""

from __future__ import annotations

from pathlib import Path

#: Of the repository.
ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
#: Recorded values and small files, most of them openpi's.
DATA = TESTS / "data"

"""What names test files by hand names files that there are; settings are checked before anything runs."""

from __future__ import annotations

import pytest

from tests.support import portable
from tests.support.longest import LONGEST
from tests.support.paths import TESTS


@pytest.mark.parametrize("pattern", [*portable.NUMERIC, *LONGEST])
def test_every_pattern_finds_a_file(pattern: str) -> None:
    assert list(TESTS.glob(pattern))


@pytest.mark.parametrize("part", portable.NOT_NUMERIC)
def test_what_is_left_out_is_there(part: str) -> None:
    assert any(part in path.read_text() for pattern in portable.NUMERIC for path in TESTS.glob(pattern))


def test_an_unknown_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert portable.main(["--settings", "aten avx2, sse9"]) == 2
    said = capsys.readouterr()
    assert "settings are ['sse9'], expected some of ['as it is'" in said.err and said.out == ""

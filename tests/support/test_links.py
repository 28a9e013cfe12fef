"""The checker of links finds what is planted, and nothing in the repository's own documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import links
from tests.support.paths import ROOT

OTHER = """# Other

## The wire

## The wire

## π0.5: `a_b` & [more](other.md)

<a name="old"></a>
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of a few files."""
    files = {
        "docs/other.md": OTHER,
        "engine/plan.py": "def plan_buffers(): ...\n",
        "engine/__init__.py": "",
        "kernels/__init__.py": "",
        "python/pi0_engine/__init__.py": "from pi0_engine.policy import Pi0Policy\n",
        "python/pi0_engine/policy.py": "class Pi0Policy: ...\n",
        "python/pi0_engine/_C.pyi": "",
        "python/pi0_engine/serving/__init__.py": "",
        "python/pi0_engine/serving/wire.py": "def packb(): ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def faults(root: Path, text: str) -> list[str]:
    (root / "docs" / "page.md").write_text(text, encoding="utf-8")
    return links.check(root, ["docs/page.md"]).faults


GOOD = """# A page

[other](other.md), [its
part](other.md#the-wire), [the second](other.md#the-wire-1), [a title](other.md#other "Other"), [up](../engine/plan.py),
[here](#a-page), [old](other.md#old), [`in code`](other.md#π05-a_b--more), [elsewhere](https://example.org/no#thing),
[from the root](/engine/), [by name][name].

[name]: other.md

`engine/plan.py`, `serving/wire.py`, `pytest -q docs/other.md::test_it`, `kernels/`, `engine/*.py`, `a/b`, `x / 255`,
`tests/test_<file>.py`, `tests/{a,b}.py`, `tests/…`, `docs/sm_XX.md`, `/etc/no.py`, `gs://bucket/no.md`.
`pi0_engine.policy`, `pi0_engine.Pi0Policy`, `pi0_engine.policy.Pi0Policy.infer`, `pi0_engine.serving.wire.packb`,
`pi0_engine.engine.plan.plan_buffers`, `pi0_engine.kernels`, `pi0_engine._C`, `lerobot_policy_pi0_engine.nothing`.

```python
# No heading: `engine/gone.py`
value = table["[x](gone.md)"]
```
"""


def test_a_good_page_has_no_fault(root: Path) -> None:
    (root / "docs" / "page.md").write_text(GOOD, encoding="utf-8")
    report = links.check(root, ["docs/*.md"])
    assert report.faults == []
    assert report.files == 2 and report.links == 10 + 5 + 7 + 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](gone.md)", "the link gone.md leads to no file"),
        ("![x](gone.png)", "the link gone.png leads to no file"),
        ("[![x](gone.png)](other.md)", "the link gone.png leads to no file"),
        ("[`x`](gone.md)", "the link gone.md leads to no file"),
        ("[x]: gone.md", "the link gone.md leads to no file"),
        ("[x](../../gone.md)", "the link ../../gone.md leads out of the repository"),
        ("[x](#gone)", "the link #gone leads to no heading of docs/page.md"),
        ("[x](other.md#gone)", "the link other.md#gone leads to no heading of docs/other.md"),
        ("[x](other.md#the-wire-2)", "the link other.md#the-wire-2 leads to no heading of docs/other.md"),
        ("`engine/gone.py`", "`engine/gone.py` is neither in the repository nor in python/pi0_engine/"),
        ("`serving/gone.py`", "`serving/gone.py` is neither in the repository nor in python/pi0_engine/"),
        ("`pytest tests/gone`", "`tests/gone` is neither in the repository nor in python/pi0_engine/"),
        ("`docs/gone*.md`", "`docs/gone*.md` is neither in the repository nor in python/pi0_engine/"),
        (
            "`pi0_engine.serving.gone`",
            "pi0_engine.serving.gone is not there: no gone in python/pi0_engine/serving/__init__.py",
        ),
        ("`pi0_engine.gone`", "pi0_engine.gone is not there: no gone in python/pi0_engine/__init__.py"),
        ("`pi0_engine.engine.plan.gone`", "pi0_engine.engine.plan.gone is not there: no gone in engine/plan.py"),
        ("```\nimport pi0_engine.gone\n```", "pi0_engine.gone is not there: no gone in python/pi0_engine/__init__.py"),
    ],
)
def test_what_leads_nowhere_is_named(root: Path, text: str, fault: str) -> None:
    line = 3 + text.startswith("```")
    assert faults(root, f"# A page\n\n{text}\n\n[good](other.md)\n") == [f"docs/page.md:{line}: {fault}"]


def test_faults_come_in_the_order_of_the_page(root: Path) -> None:
    found = faults(root, "[a](gone.md) `pi0_engine.gone`\n\n`engine/gone.py`\n[b\nb](gone.md)\n")
    assert [fault.split(":")[1] for fault in found] == ["1", "1", "3", "5"]


def test_headings_of_code_are_none(root: Path) -> None:
    assert links.anchors("# One\n\n~~~\n# Two\n~~~\n\n### One #\n") == {"one", "one-1"}
    assert links.anchors("# A\n# A-1\n# A\n") == {"a", "a-1", "a-2"}


def test_a_document_that_is_gone_is_a_fault(root: Path) -> None:
    assert links.check(root, ["docs/other.md", "GONE.md"]).faults == ["GONE.md:1: there is no such document"]


def test_the_documents_lead_somewhere() -> None:
    report = links.check(ROOT)
    assert report.links > 100 and not report.faults, "\n".join(report.faults)

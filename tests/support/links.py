"""Where the documents lead: ``python -m tests.support.links`` names every link that leads nowhere.

Links, images and anchors as GitHub reads them, paths of the repository in backticks, and dotted names of modules. A
path that says where something would be (``<name>``, ``{a,b}``, ``sm_XX``) is not looked for, one with ``*`` must fit a
file. In fenced code only names of modules are looked for. Addresses of other places are not asked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tests.support.paths import ROOT

#: What is read: files, or patterns of them.
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md", "benchmarks/README.md"),
    "python/lerobot_policy_pi0_engine/README.md",
)
#: A path in backticks that begins with one of these is the repository's, and so is any that ends as a Python file or a
#: document does. The documents leave out ``python/pi0_engine/`` in front of a path.
FOLDERS = ("docs", "tests", "benchmarks", "engine", "kernels", "csrc", "python")
PACKAGE = "python/pi0_engine"

_FENCED = re.compile(r"^ *(`{3,}|~{3,})[^\n`]*\n.*?(?:^ *\1[`~]*[ \t]*$|\Z)", re.M | re.S)
_CODE = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n[ \t]*\n).)+?)(?<!`)\1(?!`)", re.S)
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", re.M)
_NAMED = re.compile(r"<[^<>]+\b(?:id|name)=[\"']?([\w.:-]+)")
#: Behind a text in brackets, and ``[name]: target`` in a line of its own.
_LINK = re.compile(r"(?:\]\(\s*|^ {0,3}\[(?!\^)[^\]\n]+\]:\s*)<?([^\s<>()]+)", re.M)
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|//")
_PLACEHOLDER = re.compile(r"[<>{}$…]|\.\.\.|XX")
_MODULE = re.compile(r"(?<![\w./-])pi0_engine((?:\.[A-Za-z_]\w*)+)")


@dataclass
class Report:
    """How many files were read, how many links, paths and modules followed; of faults, ``FILE:LINE: what``."""

    files: int = 0
    links: int = 0
    faults: list[str] = field(default_factory=list)


def check(root: Path, documents: Sequence[str] = DOCUMENTS) -> Report:
    """Follow everything that the documents under ``root`` point at."""
    report = Report()
    for pattern in documents:
        if not (paths := sorted(root.glob(pattern))):
            report.faults.append(f"{pattern}:1: there is no such document")
        report.files += len(paths)
        for path in paths:
            text = path.read_text(encoding="utf-8")
            for offset, fault in sorted(_followed(text, path, root), key=lambda found: found[0]):
                report.links += 1
                if fault:
                    line = text.count("\n", 0, offset) + 1
                    report.faults.append(f"{path.relative_to(root).as_posix()}:{line}: {fault}")
    return report


def _followed(text: str, document: Path, root: Path) -> Iterator[tuple[int, str | None]]:
    """Of everything that points somewhere: its offset, and what is wrong with it, if anything is."""
    for found in _MODULE.finditer(text):
        yield found.start(), _module_fault(found[1].split(".")[1:], root)
    prose = _FENCED.sub(_blank, text)
    for found in _CODE.finditer(prose):
        for word in re.finditer(r"\S+", found[2]):
            path = word[0].partition("::")[0].strip("\"'(),;:")
            if _looks_like_a_path(path):
                yield found.start(2) + word.start(), _path_fault(path, root)
    for found in _LINK.finditer(_CODE.sub(_blank, prose)):
        if not _ELSEWHERE.match(found[1]):
            yield found.start(1), _link_fault(found[1], document, root)


def _blank(found: re.Match[str]) -> str:
    """Spaces in place of a text, so that what is behind it stays where it is."""
    return re.sub(r"[^\n]", " ", found[0])


def _link_fault(target: str, document: Path, root: Path) -> str | None:
    name, _, anchor = target.partition("#")
    folder = root if name.startswith("/") else document.parent
    path = Path(os.path.normpath(folder / unquote(name).lstrip("/"))) if name else document
    if not path.is_relative_to(root):
        return f"the link {target} leads out of the repository"
    if not path.exists():
        return f"the link {target} leads to no file"
    if anchor and path.suffix == ".md" and unquote(anchor) not in anchors(path.read_text(encoding="utf-8")):
        return f"the link {target} leads to no heading of {path.relative_to(root).as_posix()}"
    return None


def anchors(text: str) -> set[str]:
    """What may stand behind the # of a link to a document: its headings as GitHub names them, and names in HTML."""
    prose = _FENCED.sub(_blank, text)
    counts: dict[str, int] = {}
    for heading in _HEADING.findall(prose):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        first = name = re.sub(r"[^\w -]", "", shown.lower()).replace(" ", "-")
        while name in counts:
            counts[first] += 1
            name = f"{first}-{counts[first]}"
        counts[name] = 0
    return {*counts, *_NAMED.findall(_CODE.sub(_blank, prose))}


def _looks_like_a_path(word: str) -> bool:
    if "/" not in word or word.startswith(("/", "~")) or _ELSEWHERE.match(word) or _PLACEHOLDER.search(word):
        return False
    return PurePosixPath(word).parts[0] in FOLDERS or word.endswith((".py", ".md"))


def _path_fault(path: str, root: Path) -> str | None:
    places = (root, root / PACKAGE)
    there = any(any(place.glob(path)) if "*" in path else (place / path).exists() for place in places)
    return None if there else f"`{path}` is neither in the repository nor in {PACKAGE}/"


def _module_fault(parts: list[str], root: Path) -> str | None:
    """The last part that is a module must have what follows it, if anything does, in its text."""
    place = root if parts[0] in ("engine", "kernels") else root / PACKAGE
    text = place / "__init__.py"
    for part in parts:
        files = (place / part / "__init__.py", place / f"{part}.py", place / f"{part}.pyi")
        module = next((file for file in files if file.is_file()), None)
        if module is None:
            if text.is_file() and re.search(rf"\b{part}\b", text.read_text(encoding="utf-8")):
                return None
            return f"pi0_engine.{'.'.join(parts)} is not there: no {part} in {text.relative_to(root).as_posix()}"
        place, text = place / part, module
    return None


def main() -> int:
    report = check(ROOT)
    print(*(report.faults or [f"{report.files} files, {report.links} links: each leads somewhere"]), sep="\n")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())

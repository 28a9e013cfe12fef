"""What several subcommands share: the names of choices, and how results are printed."""

from __future__ import annotations

import json
import sys
from typing import Any

from pi0_engine.config import AttentionName, BackendName, DtypeName, SolverName

Attention = AttentionName
Backend = BackendName
Dtype = DtypeName
Solver = SolverName


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2)
    print()


def show_progress(json_output: bool) -> bool:
    """Bars only for people: on a terminal, and not beside JSON."""
    return sys.stderr.isatty() and not json_output


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Plain aligned columns, the first ``left`` of them to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)

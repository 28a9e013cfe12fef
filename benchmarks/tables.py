"""Results as text: ``python benchmarks/tables.py FOLDER`` prints what the files of results in a folder hold."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_KERNELS = ("op", "calls", "floor", "triton", "of floor", "torch", "library", "flash_attn")
_POLICY = ("views", "replay p50", "p99", "wall p50", "floor", "of floor", "nodes", "eager", "compiled", "ratio")


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns, the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def policy_table(report: dict[str, Any]) -> str:
    """One line per number of views, milliseconds; the ratio is compiled over replay."""
    rows = []
    for views, row in report["views"].items():
        replay, compiled = row.get("replay", {}), row.get("compiled", {})
        rows.append(
            [
                views if row.get("verified") else f"{views} (not verified)",
                number(replay.get("p50_ms")),
                number(replay.get("p99_ms")),
                number(row.get("wall", {}).get("p50_ms")),
                number(row.get("floor", {}).get("total", {}).get("floor_ms")),
                number(row.get("percent_of_floor"), "{:.0f} %"),
                str(row.get("graph", {}).get("nodes", "-")),
                number(row.get("eager", {}).get("p50_ms")),
                number(compiled.get("p50_ms")),
                number(compiled.get("over_engine_replay"), "{:.2f} x"),
            ]
        )
    return aligned(_POLICY, rows)


def kernels_table(report: dict[str, Any]) -> str:
    """Microseconds per call. "library" is the bare product or attention, without what else the op does."""
    rows = []
    for row in report["ops"]:
        found = row["implementations"]
        us = {n: "error" if "error" in entry else number(entry["us"]) for n, entry in found.items()}
        ours = found.get("triton", {}).get("us")
        percent = f"{100 * row['floor_us'] / ours:.0f} %" if ours else "-"
        times = [us.get(name, "-") for name in ("triton", "torch", "library", "flash_attn")]
        rows.append([row["op"], str(row["calls"]), number(row["floor_us"]), times[0], percent, *times[1:]])
    return aligned(_KERNELS, rows)


def graph_table(report: dict[str, Any]) -> str:
    """Of each number of views: how many nodes of which kind, and how often each kernel runs."""
    lines = []
    for views, row in report["views"].items():
        graph = row.get("graph", {"error": "no graph was captured"})
        if "error" in graph:
            lines.append(f"{views} views: {graph['error']}")
            continue
        kinds = ", ".join(f"{count} {kind}" for kind, count in graph["kinds"].items())
        lines.append(f"{views} views: {graph['nodes']} nodes ({kinds})")
        for name, kernel in sorted(graph["kernels"].items(), key=lambda item: -item[1]["launches"]):
            lines.append(f"  {kernel['launches']:>5}  {name[:80]}  grids {kernel['grids'][:6]}")
    return "\n".join(lines)


def results(folder: Path) -> dict[Path, dict[str, Any]]:
    """What the JSON files of a folder hold, those of whole policies first."""
    files = sorted(folder.glob("*.json"), key=lambda path: (path.stem.endswith("_kernels"), path.name))
    return {path: json.loads(path.read_text()) for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--graph", action="store_true", help="only the nodes of captured graphs")
    options = parser.parse_args()
    counted = False
    for path, report in results(options.folder).items():
        if report.get("kind") == "kernels" and not options.graph:
            print(f"{path.name}\n{kernels_table(report)}\n")
        elif report.get("kind") == "policy":
            print(f"{path.name}\n{graph_table(report) if options.graph else policy_table(report)}\n")
            counts = {views: row.get("graph", {}).get("nodes") for views, row in report["views"].items()}
            counted = counted or all(counts.values())
            if options.graph:
                print(", ".join(f"{views} views: {nodes} nodes" for views, nodes in counts.items()))
    return 0 if counted or not options.graph else 1


if __name__ == "__main__":
    sys.exit(main())

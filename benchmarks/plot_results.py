"""From the files of results: a plot, and the README's table.

    python benchmarks/plot_results.py              # rewrites the README between its markers, and results/policy.png
    python benchmarks/plot_results.py build/gpu    # only draws what another folder holds

Every number comes from a file of results; there is no other place to write one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS
from tables import number, results

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
#: What is drawn for each number of views: name -> where the milliseconds are.
_SERIES = {
    "reference, eager": ("eager", "p50_ms"),
    "reference, torch.compile": ("compiled", "p50_ms"),
    "engine, wall": ("wall", "p50_ms"),
    "engine, replay": ("replay", "p50_ms"),
}


def readme_section(found: Mapping[Path, Mapping[str, Any]]) -> str:
    """Markdown of all results: a table per GPU and model, then one per CPU run."""
    on_gpu = [_gpu_section(path, report) for path, report in found.items() if _is_complete(report)]
    on_cpu = [_cpu_section(path, report) for path, report in found.items() if "kind" not in report]
    pending = [] if on_gpu else ["GPU figures are pending: none has been recorded yet. `make gpu` records them."]
    return "\n\n".join([*on_gpu, *on_cpu, *pending])


def insert(readme: str, section: str) -> str:
    """``readme`` with what stands between the markers replaced.

    Raises:
        ValueError: the markers are not there, in order, once each.
    """
    if not (readme.count(BEGIN) == readme.count(END) == 1 and readme.index(BEGIN) < readme.index(END)):
        raise ValueError(f"the README needs {BEGIN} and {END}, once each and in this order")
    return f"{readme[: readme.index(BEGIN)]}{BEGIN}\n{section}\n{readme[readme.index(END) :]}"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Bars per number of views: reference, engine, and the floor as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    views = list(report["views"])
    for index, (name, (part, key)) in enumerate(_SERIES.items()):
        heights = [report["views"][v].get(part, {}).get(key, 0.0) for v in views]
        if any(heights):
            at = [i + 0.2 * (index - 1.5) for i in range(len(views))]
            bars = axis.bar(at, heights, 0.2, label=name)
            axis.bar_label(bars, labels=[f"{h:.3g}" if h else "" for h in heights], fontsize=8)
    for i, v in enumerate(views):
        floor = report["views"][v].get("floor", {}).get("total", {}).get("floor_ms")
        if floor:
            label = "floor of this GPU" if i == 0 else None
            axis.hlines(floor, i - 0.45, i + 0.45, colors="black", linestyles="dashed", linewidth=1, label=label)
    axis.set_yscale("log")
    axis.set_xticks(range(len(views)), [f"{v} view{'s' if v != '1' else ''}" for v in views])
    axis.set_ylabel("milliseconds (p50)")
    axis.set_title(f"{_model(report)} on {report['environment']['device']}", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    options = parser.parse_args()
    found = results(options.folder)
    for path, report in found.items():
        if report.get("kind") == "policy":
            try:
                draw(path.with_suffix(".png"), report)
            except ImportError:
                print("no picture: matplotlib is not installed")
    if options.folder.resolve() == RESULTS.resolve():
        readme = ROOT / "README.md"
        readme.write_text(insert(readme.read_text(), readme_section(found)))
    return 0


def _is_complete(report: Mapping[str, Any]) -> bool:
    """Only verified figures of a whole policy on a GPU are published."""
    views = report.get("views")
    return (
        report.get("kind") == "policy"
        and report["workload"]["full_size"]
        and isinstance(views, dict)
        and bool(views)
        and all(row.get("verified") and "replay" in row for row in views.values())
    )


def _gpu_section(path: Path, report: Mapping[str, Any]) -> str:
    environment = report["environment"]
    lines = [
        f"{_model(report)}, prompt of {report['workload']['prompt_tokens']} tokens, on {environment['device']} "
        f"(torch {environment['torch']}, Triton {environment['triton']}, driver {environment['driver']}; "
        f"[all numbers](benchmarks/results/{path.name})). Milliseconds, p50 unless it says otherwise; wall is numpy in "
        "to numpy out; the floor is what the GPU's measured rate and bandwidth allow:",
        "",
        "| views | replay | replay p99 | wall | floor | of floor | reference | torch.compile | compiled / replay |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for views, row in report["views"].items():
        compiled = _verified(row, "compiled")
        cells = [
            views,
            number(row["replay"]["p50_ms"]),
            number(row["replay"]["p99_ms"]),
            number(row["wall"]["p50_ms"]),
            number(row["floor"]["total"]["floor_ms"]),
            number(row["percent_of_floor"], "{:.0f} %"),
            number(_verified(row, "eager").get("p50_ms"), "{:.1f}"),
            number(compiled.get("p50_ms"), "{:.1f}"),
            number(compiled.get("over_engine_replay"), "{:.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verified(row: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row.get(part, {})
    return found if found.get("verified") else {}


def _cpu_section(path: Path, report: Mapping[str, Any]) -> str:
    """One run of ``pi0-engine bench --json``, in seconds."""
    work, engine = report["workload"], report["engine"]
    stages = [f"{name} {row['p50_ms'] / 1e3:.1f}" for name, row in engine.items() if name not in ("inputs", "total")]
    rows = [("engine", f"{engine['total']['p50_ms'] / 1e3:.1f} s ({', '.join(stages)})")]
    baseline = report.get("baseline", {})
    if "prefix_tokens" in baseline:  # the reference
        took = f"{baseline['p50_ms'] / 1e3:.1f} s"
        rows += [
            (f"reference, same run, on the {baseline['prefix_tokens']} prefix tokens that openpi computes", took),
            ("ratio", f"{report['speedup']:.1f}"),
        ]
    rows.append(("peak memory of the engine", f"{report['peak_memory_bytes'] / 1e9:.1f} GB"))
    return "\n".join(
        [
            f"{_model(report)}, {work['views']} views, {work['prompt_tokens']}-token prompt, on "
            f"{report['machine']['threads']} cores of {report['machine']['device']} "
            f"([all numbers](benchmarks/results/{path.name})):",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _model(report: Mapping[str, Any]) -> str:
    work = report["workload"]
    name = {"pi0": "π0", "pi05": "π0.5"}[work["model"]]
    size = "Full-size" if work.get("full_size", True) else "A small"
    return f"{size} {name} in {report['dtype']}, chunk of {work['horizon']}, {work['num_steps']} steps"


if __name__ == "__main__":
    sys.exit(main())

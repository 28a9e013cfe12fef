"""Everything that docs/closed_loop.md says in numbers: ``python -m pi0_engine.demo.report``, in the repository.

Runs every setting of :data:`SETTINGS` and the swapped instructions, and writes ``closed_loop_results.json``,
``closed_loop.png`` and the tables between the markers in ``closed_loop.md``. ``--redraw`` only does the latter two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pi0_engine.demo.evaluate import Setting, evaluate, summarize
from pi0_engine.demo.language import swap_instructions
from pi0_engine.demo.rollout import Execution
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.demo.tasks import TASKS
from pi0_engine.engine.machine import describe_machine
from pi0_engine.measuring.plots import new_figure, require_matplotlib

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def _bfloat16(**execution: Any) -> Setting:
    return Setting(dtype="bfloat16", execution=Execution(**execution))


#: What is compared. The first is what all others are measured against.
SETTINGS = {
    "reference, float32": Setting(backend="reference"),
    "engine, float32": Setting(dtype="float32"),
    "engine, bfloat16": _bfloat16(),
    "5 flow steps": _bfloat16(num_steps=5),
    "2 flow steps": _bfloat16(num_steps=2),
    "1 flow step": _bfloat16(num_steps=1),
    "execute 4": _bfloat16(execute=4),
    "execute 16": _bfloat16(execute=16),
    "latency 4": _bfloat16(latency=4),
    "latency 4, RTC": _bfloat16(latency=4, rtc=True),
    "latency 8": _bfloat16(latency=8),
    "latency 8, RTC": _bfloat16(latency=8, rtc=True),
}
#: So many of them, from the first, have a column in the table by task.
_BY_TASK = 3


def measure(
    checkpoint: str | Path,
    *,
    settings: Mapping[str, Setting] = SETTINGS,
    tasks: Sequence[str] = tuple(TASKS),
    episodes: int = 50,
    seed: int = 0,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All results, for JSON: ``settings`` by name, ``language``, and under which conditions.

    Args:
        settings: the first is what the others are compared with.
        tasks, episodes, seed, processes, progress: as of :func:`evaluate`.
    """
    outcomes = evaluate(
        settings,
        tasks=tasks,
        episodes=episodes,
        seed=seed,
        checkpoint=checkpoint,
        processes=processes,
        progress=progress,
    )
    policy = SETTINGS["engine, bfloat16"].policy(checkpoint)
    obeyed = swap_instructions(policy, episodes=episodes, seed=seed, progress=progress)
    reference = _flat(outcomes[next(iter(settings))])
    rows = {}
    for name, setting in settings.items():
        same = sum(one == other for one, other in zip(_flat(outcomes[name]), reference, strict=True))
        rows[name] = {"setting": asdict(setting), "as_reference": same, **summarize(outcomes[name])}
    return {
        "episodes": episodes,
        "seed": seed,
        "processes": processes or os.cpu_count(),
        "machine": describe_machine(torch.device("cpu")),
        "settings": rows,
        "language": [asdict(result) for result in obeyed],
    }


def section(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings, machine = report["settings"], report["machine"]
    together = [
        f"| {name} | {_rate(row['all'])} | {row['as_reference']}/{row['all']['episodes']} | {_steps(row['all'])} "
        f"| {row['all']['seam_jump']:.2f} | {row['all']['chunk_ms']:.0f} |"
        for name, row in settings.items()
    ]
    columns = list(settings)[:_BY_TASK]
    by_task = [
        f"| {task} | {' | '.join(_rate(settings[name]['tasks'][task]) for name in columns)} |"
        for task in settings[columns[0]]["tasks"]
    ]
    language = [
        f"| {row['scene']} | {TASKS[row['asked']].prompts[0]} | {row['opened']}/{row['episodes']} "
        f"| {row['closed']}/{row['episodes']} | {row['successes']}/{row['episodes']} |"
        for row in report["language"]
    ]
    return "\n".join(
        [
            f"{len(by_task)} tasks, {report['episodes']} episodes of each, on {machine['device']} (torch "
            f"{machine['torch']}), {report['processes']} processes of one thread side by side "
            "([all numbers](closed_loop_results.json)). Intervals are Wilson's, at 95 %.",
            "",
            "| setting | success | same outcome as the reference | control steps | jump at seams | ms per chunk |",
            "|---|---|---|---|---|---|",
            *together,
            "",
            "![Success of every setting with its 95 % interval](closed_loop.png)",
            "",
            f"| task | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
            *by_task,
            "",
            "The same scenes under both instructions:",
            "",
            "| scene of | instruction | faucet opened | faucet closed | the scene's own task |",
            "|---|---|---|---|---|",
            *language,
        ]
    )


def insert(page: str, text: str) -> str:
    """``page`` with what stands between the markers replaced.

    Raises:
        ValueError: the markers are not there, in order, once each.
    """
    if not (page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)):
        raise ValueError(f"the page needs {BEGIN} and {END}, once each and in this order")
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n{text}\n{page[page.index(END) :]}"


def draw(path: Path, report: dict[str, Any]) -> None:
    """Success of every setting with its interval; the reference's interval shaded behind them."""
    settings = report["settings"]
    figure = new_figure(figsize=(8, 0.36 * len(settings) + 1.2))
    axis = figure.subplots()
    reference = next(iter(settings.values()))["all"]
    axis.axvspan(100 * reference["low"], 100 * reference["high"], color="tab:gray", alpha=0.2, linewidth=0)
    for row, together in enumerate(entry["all"] for entry in settings.values()):
        low, rate, high = (100 * together[key] for key in ("low", "rate", "high"))
        axis.errorbar(rate, row, xerr=[[rate - low], [high - rate]], fmt="o", color="tab:blue", capsize=3, markersize=5)
    axis.set_yticks(range(len(settings)), list(settings))
    axis.invert_yaxis()
    axis.set_xlim(0, 101.5)  # a marker at 100 is seen whole
    axis.set_xlabel("episodes that succeed, %; shaded: the reference's 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pi0_engine.demo.report", description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of closed_loop.md (default docs)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the one that is shipped")
    parser.add_argument("--episodes", type=int, default=50, help="of each task and setting (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default 0)")
    parser.add_argument("--processes", type=int, help="default: as many as there are processors")
    parser.add_argument("--redraw", action="store_true", help="only the page and the picture, from the results")
    given = parser.parse_args(arguments)
    page, results = given.docs / "closed_loop.md", given.docs / "closed_loop_results.json"
    try:
        require_matplotlib()
        if not page.is_file():
            raise ValueError(f"there is no {page}: run this in the repository, or say where with --docs")
        insert(page.read_text(), "")
        if not given.redraw:
            report = measure(given.checkpoint, episodes=given.episodes, seed=given.seed, processes=given.processes)
            results.write_text(json.dumps(report, indent=1) + "\n")
        if not results.is_file():
            raise ValueError(f"there is no {results} to draw: run this without --redraw")
        report = json.loads(results.read_text())
        page.write_text(insert(page.read_text(), section(report)))
        draw(given.docs / "closed_loop.png", report)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _flat(outcomes: dict[str, Any]) -> list[bool]:
    return [episode.success for episodes in outcomes.values() for episode in episodes]


def _rate(summary: dict[str, Any]) -> str:
    low, rate, high = (round(100 * summary[key], 1) for key in ("low", "rate", "high"))
    return f"{rate:g} % ({low:g} to {high:g})"


def _steps(summary: dict[str, Any]) -> str:
    return "-" if summary["steps"] is None else f"{summary['steps']:.0f}"


if __name__ == "__main__":
    sys.exit(main())

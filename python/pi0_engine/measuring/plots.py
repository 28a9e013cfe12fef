"""Pictures for people: an action chunk per joint, a benchmark per stage, a roofline of ops, seams between chunks.

They need matplotlib (extra ``plot``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

_COLUMNS = 4


def require_matplotlib() -> None:
    """Raise ValueError where there is none. For what takes long and plots last, to call first."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'pi0-engine[plot]'")


def plot_chunk(
    path: str | Path,
    chunks: NDArray[np.floating[Any]],
    title: str,
    frames: Mapping[str, NDArray[np.uint8]] | None = None,
) -> None:
    """Draw every action dimension over the chunk, all candidate chunks in one picture.

    Args:
        path: .png, .svg or .pdf to write.
        chunks: [H, A] or [samples, H, A], in robot units.
        title: above the picture.
        frames: camera images to show on top, uint8 [H, W, 3] by name.
    """
    chunks = chunks[None] if chunks.ndim == 2 else chunks
    samples, horizon, dims = chunks.shape
    rows, frames = -(-dims // _COLUMNS), frames or {}
    figure = new_figure(figsize=(11, 1.6 * rows + (2.6 if frames else 0) + 0.8))
    below: FigureBase = figure
    if frames:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.6, 1.6 * rows))[:, 0]
        views = above.subplots(1, len(frames), squeeze=False)[0]
        for axis, (name, frame) in zip(views, frames.items(), strict=True):
            axis.imshow(frame)
            axis.set_title(name, fontsize=9)
            axis.axis("off")
    axes = below.subplots(rows, min(dims, _COLUMNS), sharex=True, squeeze=False).ravel()
    for dim, axis in enumerate(axes):
        if dim >= dims:
            axis.axis("off")
            continue
        axis.plot(np.arange(horizon), chunks[:, :, dim].T, linewidth=1.2, alpha=1.0 if samples == 1 else 0.6)
        axis.set_title(f"action {dim}", fontsize=8, pad=2)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def plot_stages(path: str | Path, stages: Sequence[str], series: Mapping[str, Sequence[float]], title: str) -> None:
    """Bars of milliseconds per stage, one colour per series (engine, floor, reference)."""
    figure = new_figure(figsize=(8, 4))
    axis = figure.subplots()
    x = np.arange(len(stages))
    for index, (name, values) in enumerate(series.items()):
        bars = axis.bar(x + 0.8 * (index + 0.5) / len(series) - 0.4, values, 0.8 / len(series), label=name)
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
    axis.set_xticks(x, stages)
    axis.set_ylabel("milliseconds")
    axis.set_title(title, fontsize=10)
    axis.legend()
    figure.savefig(path, dpi=130)


def plot_roofline(
    path: str | Path,
    points: Mapping[str, Sequence[tuple[str, float, float]]],
    flops_per_s: float,
    bytes_per_s: float,
    title: str,
) -> None:
    """FLOP/s over FLOP per byte, both logarithmic, under the two ceilings of a machine.

    Args:
        points: of each stage, one colour each: (label, FLOP per byte, FLOP/s).
        flops_per_s, bytes_per_s: the ceilings.
    """
    figure = new_figure(figsize=(9.5, 6))
    axis = figure.subplots()
    reached = [point for stage in points.values() for point in stage]
    ridge = flops_per_s / bytes_per_s
    left = min([ridge, *(intensity for _, intensity, _ in reached)]) / 2
    right = max([ridge, *(intensity for _, intensity, _ in reached)]) * 4
    x = np.geomspace(left, right, 200)
    ceilings = f"measured: {bytes_per_s / 1e9:.4g} GB/s, {flops_per_s / 1e9:.4g} GFLOP/s"
    axis.plot(x, np.minimum(flops_per_s, bytes_per_s * x), color="black", linewidth=1.2, label=ceilings)
    for stage, entries in points.items():
        axis.scatter([p[1] for p in entries], [p[2] for p in entries], s=22, label=stage, zorder=3)
        for label, intensity, rate in entries:
            axis.annotate(label, (intensity, rate), fontsize=6.5, xytext=(4, -3), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte that must cross memory")
    axis.set_ylabel("FLOP/s")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axis.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=110)


def plot_seams(
    path: str | Path,
    runs: Mapping[str, tuple[NDArray[np.floating[Any]], NDArray[np.bool_], NDArray[np.integer[Any]]]],
    period_s: float,
    title: str,
    *,
    joints: Sequence[int] = (0, 3, 7),
    unit: str = "rad",
) -> None:
    """Draw what robots were sent, one row per control loop: held steps shaded, a line where the next chunk takes over.

    Args:
        path: .png, .svg or .pdf to write.
        runs: by name: (commands [steps, A], NaN where nothing was sent; held [steps]; steps of the seams).
        period_s: of a control step.
        title: above the picture.
        joints: which dimensions to draw.
        unit: of the commands.
    """
    figure = new_figure(figsize=(11, 1.9 * len(runs) + 0.8))
    axes = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, (commands, held, seams)) in zip(axes, runs.items(), strict=True):
        at = period_s * np.arange(len(commands))
        axis.fill_between(
            at, 0, 1, where=held, step="post", transform=axis.get_xaxis_transform(), color="tab:red", alpha=0.18,
            linewidth=0, label="held: no action",
        )  # fmt: skip
        for number, seam in enumerate(seams):
            label = None if number else "next chunk takes over"
            axis.axvline(period_s * (seam - 0.5), color="black", linewidth=0.4, alpha=0.45, label=label)
        for joint in joints:
            axis.step(at, commands[:, joint], where="post", linewidth=1.1, label=f"joint {joint}")
        axis.set_title(name, fontsize=9, pad=3, loc="left")
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    axes[-1].set_xlabel("seconds", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100)


def new_figure(figsize: tuple[float, float]) -> Figure:
    """A figure without pyplot, so that no display is needed and no global state is touched."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")

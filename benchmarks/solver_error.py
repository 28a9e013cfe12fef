"""How far chunks are from the exact solution of their flow, per solver and number of network calls.

    python benchmarks/solver_error.py --demo
    python benchmarks/solver_error.py --checkpoint CHECKPOINT --robot ROBOT --observation scene_*.npz
    python benchmarks/solver_error.py --random-weights 0 --config tests/data/golden/pi0_tiny.json \\
        --case tests/data/golden/pi0_tiny_c09_only_cam1_h10_s4.npz

writes OUTPUT.json and OUTPUT.png. An observation is an .npz with the robot's observation keys (docs/robots.md) and,
where the robot's default is not meant, ``prompt``; ``--demo`` takes the shipped checkpoint and its ten recorded scenes.
From Python: ``measure(model, inputs, noise)``, then ``draw``.

The chunks are the reference's, in float32: what is measured is the method and the model, not the engine's roundings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from harness import write_json
from pi0_engine.config import SolverName
from pi0_engine.demo.recorded import recorded_observation
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.demo.tasks import TASKS
from pi0_engine.engine.choices import resolve_device
from pi0_engine.engine.solvers import CALLS_PER_STEP
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.inputs import ModelInputs
from pi0_engine.measuring.cases import load_case
from pi0_engine.measuring.plots import new_figure
from pi0_engine.model_options import ModelOptions
from pi0_engine.policy import load_transform
from pi0_engine.reference.model import Pi0Reference, integrate
from pi0_engine.robots.files import get_robot
from pi0_engine.robots.normalization import NormStats
from pi0_engine.text.files import demo_tokenizer
from tables import aligned

#: What counts as exact: 200 steps, of second order. Euler's own 200 steps are still off by a twentieth of what its ten
#: are, which would be the floor of the other curves; the report says by how much.
EXACT_STEPS = 200
MOST_CALLS = 20

Chunk = Callable[[SolverName, int], Tensor]


@torch.no_grad()
def measure(
    model: Pi0Reference,
    inputs: ModelInputs,
    noise: Tensor,
    *,
    most_calls: int = MOST_CALLS,
    action_dims: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """JSON-ready errors of every solver, by its numbers of network calls up to ``most_calls``.

    Args:
        model: in float32, on the device to compute on.
        inputs: B observations.
        noise: float32 [B, samples, H, action_dim]: where the chunks start.
        action_dims: how many of a chunk's dimensions count, from the first: those that the robot has; None counts all.

    Returns:
        ``solvers.NAME``: lists ``calls``, ``num_steps``, ``rel_l2_mean`` and ``rel_l2_max`` over the B * samples
        chunks, of ||x - exact|| / ||exact|| in the network's units. ``exact``: how it was computed, what Euler's steps
        of the same number are off (``euler_rel_l2``), and how far it may itself be off (``own_rel_l2``).

    Raises:
        ValueError: inputs or noise that the model cannot take, or numbers out of range.
    """
    config = model.config
    inputs.validate(config)
    dims = config.action_dim if action_dims is None else action_dims
    if noise.ndim != 4 or (noise.shape[0], noise.shape[3]) != (inputs.batch, config.action_dim) or not noise.numel():
        raise ValueError(f"noise is {list(noise.shape)}, expected [{inputs.batch}, samples, H, {config.action_dim}]")
    if not 1 <= dims <= config.action_dim:
        raise ValueError(f"action_dims is {dims}, expected 1 to {config.action_dim}")
    if not 1 <= most_calls <= EXACT_STEPS // 2:
        raise ValueError(f"most_calls is {most_calls}, expected 1 to {EXACT_STEPS // 2}")
    steps: dict[SolverName, list[int]] = {
        solver: list(range(1, most_calls // calls + 1)) for solver, calls in CALLS_PER_STEP.items()
    }
    jobs = [(solver, n) for solver, counts in steps.items() for n in counts]
    errors: dict[tuple[SolverName, int], list[float]] = {job: [] for job in jobs}
    own: list[float] = []
    euler: list[float] = []
    inputs = inputs.resized(FramePreprocessor(size=config.vision.image_size))
    with tqdm(total=inputs.batch * (len(jobs) + 3), desc="solvers", disable=not progress, leave=False) as bar:

        def solved(chunk: Chunk, solver: SolverName, num_steps: int) -> Tensor:
            bar.update()
            return chunk(solver, num_steps)[..., :dims]

        for b in range(inputs.batch):
            chunk = _flow(model, inputs, noise[b], b)
            exact = solved(chunk, "midpoint", EXACT_STEPS)
            # Where the flow is smooth, half as many steps are off by four times as much: a third of the difference is
            # what the exact one is.
            own += [error / 3 for error in _rel_l2(solved(chunk, "midpoint", EXACT_STEPS // 2), exact)]
            euler += _rel_l2(solved(chunk, "euler", EXACT_STEPS), exact)
            for solver, n in jobs:
                errors[solver, n] += _rel_l2(solved(chunk, solver, n), exact)
    return {
        "kind": "solver_error",
        "model": config.model_type,
        "num_steps": config.num_steps,
        "observations": inputs.batch,
        "chunks": len(own),
        "horizon": noise.shape[2],
        "action_dims": dims,
        "exact": {
            "solver": "midpoint",
            "num_steps": EXACT_STEPS,
            "own_rel_l2": float(np.mean(own)),
            "euler_rel_l2": float(np.mean(euler)),
        },
        "solvers": {
            solver: {
                "calls": [CALLS_PER_STEP[solver] * n for n in counts],
                "num_steps": counts,
                "rel_l2_mean": [float(np.mean(errors[solver, n])) for n in counts],
                "rel_l2_max": [float(np.max(errors[solver, n])) for n in counts],
            }
            for solver, counts in steps.items()
        },
    }


def _flow(model: Pi0Reference, inputs: ModelInputs, noise: Tensor, b: int) -> Chunk:
    """A function that draws the chunks [samples, H, A] of observation ``b``, whose prefix is computed here, once."""
    device, samples, row = model.projector.weight.device, len(noise), slice(b, b + 1)
    parts = (inputs.pixels, inputs.image_masks, inputs.tokens, inputs.token_mask)
    prefix, pad_mask = model.embed_prefix(*(torch.from_numpy(part[row]).to(device) for part in parts))
    cache = [(k.expand(samples, -1, -1, -1), v.expand(samples, -1, -1, -1)) for k, v in model.prefill(prefix, pad_mask)]
    pads, state = pad_mask.expand(samples, -1), torch.from_numpy(inputs.state[row]).to(device).expand(samples, -1)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return model.velocity(state, pads, cache, x, time.to(device).expand(samples))

    return lambda solver, num_steps: integrate(velocity, noise.to(device), num_steps, solver)


def _rel_l2(actual: Tensor, exact: Tensor) -> list[float]:
    """||a - b|| / ||b|| of each chunk [samples, H, A], in float64."""
    a, b = actual.double().flatten(1), exact.double().flatten(1)
    errors: list[float] = ((a - b).norm(dim=1) / b.norm(dim=1)).tolist()
    return errors


def draw(path: str | Path, report: dict[str, Any], title: str) -> None:
    """One curve per solver over the network calls, logarithmic: the mean over the chunks, shaded up to the largest."""
    figure = new_figure(figsize=(8, 4.8))
    axis = figure.subplots()
    for name, row in report["solvers"].items():
        (line,) = axis.plot(row["calls"], row["rel_l2_mean"], marker="o", markersize=3.5, label=name.replace("_", "-"))
        axis.fill_between(row["calls"], row["rel_l2_mean"], row["rel_l2_max"], color=line.get_color(), alpha=0.15)
    exact = report["exact"]
    of_exact = f"the {exact['num_steps']}-step solution's own error"
    axis.axhline(exact["own_rel_l2"], color="black", linestyle=":", linewidth=1, label=of_exact)
    default = f"the checkpoint's {report['num_steps']} Euler steps"
    axis.axvline(report["num_steps"], color="black", linewidth=0.6, alpha=0.5, label=default)
    axis.set_yscale("log")
    axis.set_xlabel("network calls per chunk")
    axis.set_ylabel(f"relative L2 from the {exact['num_steps']}-step solution")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def table(report: dict[str, Any]) -> str:
    """The means, one line per number of calls."""
    rows = []
    of = {name: dict(zip(row["calls"], row["rel_l2_mean"], strict=True)) for name, row in report["solvers"].items()}
    for calls in sorted({calls for row in of.values() for calls in row}):
        rows.append([str(calls), *(f"{row[calls]:.2e}" if calls in row else "-" for row in of.values())])
    return aligned(["calls", *of], rows)


def read_observation(path: str | Path) -> dict[str, Any]:
    """An observation from an .npz: arrays by key; a single value, like the prompt, as itself.

    Raises:
        ValueError: a file that is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: value if value.ndim else value.item() for key, value in arrays.items()}
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: an .npy, which holds no names
        raise ValueError(f"observation {path} is not an .npz of arrays: {error}") from error


def load(options: argparse.Namespace) -> tuple[Pi0Reference, ModelInputs, Tensor, int | None]:
    """Model, inputs, noise and the dimensions that count, as asked for on the command line.

    Raises:
        ValueError: anything missing or inconsistent, named.
    """
    if options.demo:
        if options.checkpoint or options.robot or options.observation or options.case:
            raise ValueError("--demo brings its checkpoint, robot and observations: expected none beside it")
        options.checkpoint, options.robot = str(CHECKPOINT), "metaworld"
    elif bool(options.case) == bool(options.observation) or bool(options.observation) != bool(options.robot):
        raise ValueError("expected either --demo, or --case FILE, or --robot NAME and --observation FILE...")
    opened = ModelOptions(checkpoint=options.checkpoint, random_weights=options.random_weights, config=options.config)
    if options.case:
        case = load_case(options.case)
        checkpoint, inputs, dims = opened.open(fallback_config=case.config), case.inputs, None
        config = checkpoint.config
    else:
        checkpoint, is_random = opened.open(), options.random_weights is not None
        transform = load_transform(
            checkpoint,
            get_robot(options.robot),
            tokenizer=options.tokenizer or (demo_tokenizer() if is_random else None),
            norm_stats=options.norm_stats or (NormStats.identity() if is_random else None),
        )
        recorded = [recorded_observation(task) for task in TASKS] if options.demo else []
        inputs, _ = transform.prepare(recorded or [read_observation(path) for path in options.observation])
        config, dims = transform.config, transform.robot.action_dim
    shape = (inputs.batch, options.samples, config.action_horizon, config.action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    model = Pi0Reference.from_tensors(config, checkpoint.tensor).to(resolve_device(options.device))
    return model, inputs, noise, dims


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the shipped small trained model, on ten scenes")
    parser.add_argument("--checkpoint", help="checkpoint file or directory, or a Hugging Face Hub id")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="instead of a checkpoint; needs --config")
    parser.add_argument("--config", help="'pi0', 'pi05' or a JSON file, where the checkpoint does not say")
    parser.add_argument("--robot", help="'aloha', 'droid', ..., or a declaration file")
    parser.add_argument("--observation", nargs="+", help=".npz files of the robot's observations")
    parser.add_argument("--case", help="instead of observations: a recorded case (docs/parity.md), for its inputs")
    parser.add_argument("--tokenizer", help="looked for beside the checkpoint and in caches where not given")
    parser.add_argument("--norm-stats", help="looked for in the checkpoint where not given")
    parser.add_argument("--samples", type=int, default=4, help="chunks per observation")
    parser.add_argument("--most-calls", type=int, default=MOST_CALLS)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/solver_error"), help="without .json and .png")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        model, inputs, noise, dims = load(options)
        report = measure(
            model, inputs, noise, most_calls=options.most_calls, action_dims=dims, progress=sys.stderr.isatty()
        )
    except ValueError as error:
        print(f"solver_error: {error}", file=sys.stderr)
        return 2
    trained = "the demo's checkpoint" if options.demo else options.checkpoint
    report["source"] = trained or f"random weights {options.random_weights}"
    write_json(Path(f"{options.output}.json"), report)
    title = f"{report['model']}, {report['source']}: {report['chunks']} chunks of {report['horizon']} actions"
    draw(f"{options.output}.png", report, title)
    exact = report["exact"]
    print(table(report))
    print(
        f"relative L2 from {exact['num_steps']} steps of {exact['solver']}, mean of {report['chunks']} chunks; that "
        f"solution itself is off by {exact['own_rel_l2']:.1e}, Euler's of {exact['num_steps']} steps by "
        f"{exact['euler_rel_l2']:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

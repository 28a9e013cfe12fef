"""Two ways around a pillar: what drawing several futures is for. ``python -m pi0_engine.demo.futures PICTURE``.

The experts pass the pillar on the left as often as on the right, and nothing in the scene says which. A policy trained
to predict the mean would run into it. π0 draws from the distribution of chunks, so each sample takes one side; the
picture shows that, and what becomes of an arm that is driven by the mean of the same samples. Chunks are carried out
whole: looking again in between would give the mean a chance to change its mind.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pi0_engine.demo.collect import FIRST_UNSEEN_SEED
from pi0_engine.demo.outputs import check_writable
from pi0_engine.demo.policies import load_policy
from pi0_engine.demo.scene import PILLAR_CENTRE, PILLAR_HALF, Scene
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.measuring.plots import new_figure, require_matplotlib

_MOST_STEPS = 160
#: Behind the pillar, in metres from the robot: the hand's fingers are clear of it.
_PASSED_Y = 0.8
_PICTURES = (".png", ".svg", ".pdf")
Driver = Literal["sample", "mean"]


@dataclass(frozen=True, eq=False)
class Walk:
    """The hand's way in one episode.

    Attributes:
        path: float64 [T, 3], its positions in metres.
        touched: whether the pillar was.
    """

    path: NDArray[np.float64]
    touched: bool

    @property
    def passed(self) -> bool:
        """Whether the hand came past the pillar."""
        return not self.touched and bool((self.path[:, 1] > _PASSED_Y).any())

    @property
    def side(self) -> int:
        """-1 or 1: on which side of the pillar the hand went furthest."""
        x = self.path[:, 0]
        return int(np.sign(x[np.argmax(np.abs(x))]))


def walk(scene: Scene, policy: Any, seed: int, *, driver: Driver = "sample", noise_seed: int = 0) -> Walk:
    """Let the policy drive, until it is at the ball, at the pillar or out of time.

    Args:
        scene: of the task ``go-around``.
        seed: of the scene.
        driver: ``sample`` carries out one drawn chunk after the other, ``mean`` the means of 32.
        noise_seed: of the draws.
    """
    observation = scene.reset(seed)
    rng = np.random.default_rng(noise_seed)
    path = [scene.state[:3]]
    while not scene.success and not scene.touched and scene.steps < _MOST_STEPS:
        for action in chunk(policy, observation, int(rng.integers(2**31)), driver):
            if not scene.touched and not scene.success:
                scene.step(action)
                path.append(scene.state[:3])
        observation = scene.observe()
    return Walk(np.stack(path), scene.touched)


def chunk(policy: Any, observation: dict[str, Any], seed: int, driver: Driver) -> NDArray[np.float32]:
    """float32 [H, 4]: one sample, or the mean of 32."""
    drawn = policy.infer(observation, seed=seed, num_samples=1 if driver == "sample" else 32)["actions"]
    actions: NDArray[np.float32] = drawn if driver == "sample" else drawn.mean(axis=0)
    return actions


def plot(samples: list[Walk], means: list[Walk], picture: Path) -> None:
    """The walks from above."""
    figure = new_figure(figsize=(9, 4.5))
    from matplotlib.patches import Rectangle

    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, walks, title in zip(
        axes, (samples, means), ("one sample per chunk", "the mean of 32 samples"), strict=True
    ):
        (x, y, _), (half_x, half_y, _) = PILLAR_CENTRE, PILLAR_HALF
        axis.add_patch(Rectangle((x - half_x, y - half_y), 2 * half_x, 2 * half_y, color="0.4", label="pillar"))
        for one in walks:
            colour = ("tab:green" if one.side > 0 else "tab:blue") if one.passed else "tab:red"
            axis.plot(one.path[:, 0], one.path[:, 1], color=colour, lw=1, alpha=0.6)
            axis.plot(*one.path[-1, :2], ".", color=colour)
        done = sum(one.passed for one in walks)
        axis.set(title=f"{title}: {done} of {len(walks)} pass the pillar", xlabel="x (m)", aspect="equal")
    axes[0].set_ylabel("y (m), away from the robot")
    figure.savefig(picture, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pi0_engine.demo.futures", description=__doc__)
    parser.add_argument("picture", type=Path, help=".png, .svg or .pdf")
    parser.add_argument("--walks", type=int, default=30, help="of each kind, all in the same scene (default 30)")
    parser.add_argument("--seed", type=int, default=FIRST_UNSEEN_SEED, help="of the scene")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    given = parser.parse_args(arguments)
    try:
        if given.picture.suffix not in _PICTURES:
            raise ValueError(f"the picture is to be {str(given.picture)!r}, expected one of {', '.join(_PICTURES)}")
        if given.walks < 1 or given.seed < 0:
            raise ValueError(f"walks is {given.walks}, seed {given.seed}: expected at least 1 and 0")
        require_matplotlib()
        check_writable(given.picture)
        policy = load_policy(given.checkpoint)
        walks: dict[Driver, list[Walk]] = {"sample": [], "mean": []}
        with Scene("go-around") as scene, tqdm(total=2 * given.walks, unit="walk") as bar:
            for driver, found in walks.items():
                for number in range(given.walks):
                    found.append(walk(scene, policy, given.seed, driver=driver, noise_seed=number))
                    bar.update()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(walks["sample"], walks["mean"], given.picture)
    for driver, found in walks.items():
        left, right = (sum(one.passed and one.side == side for one in found) for side in (-1, 1))
        touched = sum(one.touched for one in found)
        print(f"{driver:6}  passed left {left}, right {right}, touched the pillar {touched}, of {len(found)}")
    print(f"picture {given.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether the instruction decides: the same scenes with one instruction and with the other.

The two faucet tasks begin alike, with the handle in the middle: what happens is up to the instruction alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from pi0_engine.demo.collect import unseen_seeds
from pi0_engine.demo.rollout import ChunkPolicy, Execution, run_episode
from pi0_engine.demo.scene import Scene
from pi0_engine.demo.tasks import get_task

#: Tasks whose scenes begin alike.
PAIR = ("faucet-open", "faucet-close")
#: The handle turns by 90 degrees to either side; Meta-World's own criteria are met at 80 and -73.
_TURNED_DEGREES = 70.0


@dataclass(frozen=True)
class Obedience:
    """What happened in scenes of one task under the instruction of another, or of the same.

    Attributes:
        scene, asked: tasks: whose scenes they were, and whose first prompt was given.
        episodes: how many.
        successes: of the scenes' own task.
        opened, closed: how often the faucet was, in the end.
    """

    scene: str
    asked: str
    episodes: int
    successes: int
    opened: int
    closed: int


def swap_instructions(
    policy: ChunkPolicy, *, episodes: int, seed: int = 0, execution: Execution | None = None, progress: bool = True
) -> list[Obedience]:
    """Both scenes of :data:`PAIR` under both instructions: the same scenes and noise with each.

    Args:
        policy: who drives.
        episodes: of each of the four, at most 10,000.
        seed: 0, 1, ...: other scenes each.
        execution: as of :func:`run_episode`.
        progress: show a bar.

    Raises:
        ValueError: numbers that cannot be used; no simulator.
    """
    seeds, results = unseen_seeds(episodes, seed), []
    with tqdm(total=len(PAIR) ** 2 * episodes, unit="episode", disable=not progress) as bar:
        for name in PAIR:
            with Scene(name) as scene:
                for asked in PAIR:
                    successes, angles = 0, []
                    for number in seeds:
                        episode = run_episode(
                            scene,
                            policy,
                            number,
                            prompt=get_task(asked).prompts[0],
                            execution=execution,
                        )
                        successes += episode.success
                        angles.append(handle_degrees(scene))
                        bar.update()
                    opened = sum(angle > _TURNED_DEGREES for angle in angles)
                    closed = sum(angle < -_TURNED_DEGREES for angle in angles)
                    results.append(Obedience(name, asked, episodes, successes, opened, closed))
    return results


def handle_degrees(scene: Scene) -> float:
    """How far the faucet's handle is turned: 0 in the middle, 90 fully open, -90 fully closed."""
    return scene.joint_degrees("knob_Joint_1")

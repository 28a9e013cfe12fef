"""What the simulated arm can be asked to do: environments of Meta-World v3 and instructions for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One kind of scene.

    Attributes:
        environment: its name in Meta-World v3, without the version.
        prompts: ways to ask for it, all of which are trained.
        shows_goal: whether Meta-World's marker of the goal is drawn: only where the goal is nothing but a place in
            the air. Anywhere else it would tell the policy what the instruction should.
        obstacle: whether a pillar stands in the way, which can be passed on either side.
        share: how many times as many demonstrations as of other tasks are recorded, and how many times as often one
            is trained on. A ball may hang anywhere in a box of 20 x 10 x 25 cm, a drawer only moves left and right.
    """

    environment: str
    prompts: tuple[str, ...]
    shows_goal: bool = False
    obstacle: bool = False
    share: int = 1


TASKS = {
    "reach": Task(
        "reach", ("reach the ball", "move the hand to the ball", "go to the green ball"), shows_goal=True, share=3
    ),
    "button-press": Task(
        "button-press-topdown", ("press the button", "push the button down", "press the red button from above")
    ),
    "drawer-open": Task("drawer-open", ("open the drawer", "pull the drawer out", "pull the drawer open")),
    "drawer-close": Task("drawer-close", ("close the drawer", "push the drawer in", "push the drawer shut")),
    "window-open": Task("window-open", ("open the window", "slide the window open", "move the window to the right")),
    "window-close": Task("window-close", ("close the window", "slide the window shut", "move the window to the left")),
    "faucet-open": Task("faucet-open", ("open the faucet", "turn the faucet on", "turn on the water")),
    "faucet-close": Task("faucet-close", ("close the faucet", "turn the faucet off", "turn off the water")),
    "handle-press": Task("handle-press", ("press the handle", "push the handle down", "press the handle down")),
    "go-around": Task(
        "reach-wall",
        ("reach the ball behind the pillar", "go around the pillar to the ball", "move past the pillar to the ball"),
        shows_goal=True,
        obstacle=True,
        share=3,
    ),
}


def get_task(name: str) -> Task:
    """Raises ValueError for a name that is not in :data:`TASKS`."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is none of {', '.join(TASKS)}")
    return TASKS[name]

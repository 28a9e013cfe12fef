"""``pi0-engine demo``: a small trained π0 drives a simulated robot by an instruction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from pi0_engine.commands.options import Backend, Dtype, table
from pi0_engine.config import EngineConfig
from pi0_engine.demo.collect import FIRST_UNSEEN_SEED
from pi0_engine.demo.film import Film
from pi0_engine.demo.outputs import check_writable
from pi0_engine.demo.recorded import recorded_observation
from pi0_engine.demo.rollout import Episode, Execution, Look, run_episode
from pi0_engine.demo.scene import CAMERAS, CONTROL_HZ, Scene, load_simulator
from pi0_engine.demo.shipped import CHECKPOINT
from pi0_engine.demo.tasks import TASKS
from pi0_engine.measuring.plots import plot_chunk, require_matplotlib
from pi0_engine.policy import Pi0Policy

if TYPE_CHECKING:
    from pi0_engine.demo.policies import ReferencePolicy

#: Candidate chunks in the plot.
_SAMPLES = 4


@dataclass(frozen=True)
class Demo:
    """Tell a simulated robot what to do, and watch a small π0 do it.

    The policy sees two camera frames of 64 x 64 pixels, the hand's position and the instruction. It carries out half of
    a chunk of 16 actions, looks again, and so on until the task is done. The first chunk is compared with the plain
    PyTorch reference. Without the simulator (extra `sim`) a recorded observation is answered instead.
    """

    prompt: Annotated[str, tyro.conf.arg(aliases=["--instruction"])] = "open the drawer"
    """What to do: one of the instructions that the policy was trained with. Another one prints them all."""
    seed: int = 0
    """Which scene, and the noise."""
    checkpoint: str | None = None
    """Of this robot; the one that is shipped where not given."""
    device: str = "cpu"
    dtype: Dtype = "auto"
    backend: Backend = "auto"
    execute: int = 8
    """Control steps from one look at the scene to the next."""
    output: str = "demo.gif"
    """Where the film goes (.gif or .mp4); the plot of the first chunk goes beside it, as .png."""

    def run(self) -> int:
        from pi0_engine.demo.policies import load_policy, load_reference

        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")
        task, prompt = find_instruction(self.prompt)
        execution = Execution(execute=self.execute)
        film, plot = Film(self.output), Path(self.output).with_suffix(".png")
        check_writable(plot)
        require_matplotlib()
        checkpoint = self.checkpoint or CHECKPOINT
        policy = load_policy(checkpoint, EngineConfig(device=self.device, dtype=self.dtype, backend=self.backend))
        execution.check(policy.config.action_horizon)
        reference = load_reference(checkpoint)
        policy.warm_up()
        print(f'instruction  "{prompt}" (task {task}, scene {self.seed})')
        engine = policy.engine.describe()
        print(f"engine       {engine['dtype']} on {engine['device']}\n")
        try:
            load_simulator()
        except ValueError as error:
            print(f"There is no simulator: {error}\nA recorded observation is answered instead; nothing moves.\n")
            observation = {**recorded_observation(task), "prompt": prompt}
            self._show_first_chunk(policy, reference, observation, plot)
            _print_stages([policy.infer(observation, seed=self.seed)])
            return 0
        with Scene(task) as scene:
            observation = {**scene.reset(FIRST_UNSEEN_SEED + self.seed), "prompt": prompt}
            self._show_first_chunk(policy, reference, observation, plot)
            looks: list[Look] = []

            def on_look(look: Look) -> None:
                looks.append(look)
                film.look(look.observation)
                x, y, z = look.observation["observation/state"][:3]
                took = look.reply["policy_timing"]["infer_ms"]
                print(f"step {look.step:3}     hand at ({x:5.2f}, {y:5.2f}, {z:5.2f}) m, next chunk in {took:.1f} ms")

            episode = run_episode(
                scene,
                policy,
                FIRST_UNSEEN_SEED + self.seed,
                prompt=prompt,
                execution=execution,
                on_look=on_look,
                on_step=lambda after, _: film.add(after),
            )
        film.save()
        print(_outcome(episode))
        _print_stages([look.reply for look in looks])
        print(f"\nfilm         {film.path}, at {film.speed:g} of the robot's speed")
        return 0 if episode.success else 1

    def _show_first_chunk(
        self, policy: Pi0Policy, reference: ReferencePolicy, observation: dict[str, Any], plot: Path
    ) -> None:
        from pi0_engine.engine.arrays import as_tensor
        from pi0_engine.measuring.cases import Difference, sample_reference

        inputs, _ = policy.transform.prepare(observation)
        config = policy.config
        rng = np.random.default_rng(self.seed)
        noise = rng.standard_normal((1, 1, config.action_horizon, config.action_dim), dtype=np.float32)
        expected = sample_reference(reference.model, inputs, as_tensor(noise[0]), config.num_steps)
        difference = Difference.between(policy.engine.infer(inputs, noise).actions[0], expected)
        print(f"parity       relative L2 {difference.rel_l2:.1e} against the float32 reference, first chunk")
        actions = policy.infer(observation, seed=self.seed, num_samples=_SAMPLES)["actions"]
        plot_chunk(plot, actions, observation["prompt"], {camera: observation[camera] for camera in CAMERAS})
        print(f"plot         {plot}, {_SAMPLES} candidates for the first chunk\n")


def find_instruction(given: str) -> tuple[str, str]:
    """The task that an instruction belongs to, and the instruction as it was trained.

    Case, surrounding and repeated blanks and a full stop make no difference.

    Raises:
        ValueError: it belongs to none; lists those that there are.
    """
    wanted = _normalized(given)
    for name, task in TASKS.items():
        for prompt in task.prompts:
            if _normalized(prompt) == wanted:
                return name, prompt
    known = "\n".join(f"  {'; '.join(task.prompts)}" for task in TASKS.values())
    raise ValueError(f"the policy was not trained to {given!r}, expected one of\n{known}")


def _normalized(instruction: str) -> str:
    return " ".join(instruction.lower().split()).removesuffix(".").rstrip()


def _outcome(episode: Episode) -> str:
    after = f"{episode.steps} control steps ({episode.steps / CONTROL_HZ:.1f} s) and {episode.inferences} chunks"
    return f"{'success ' if episode.success else 'failure '}     after {after}\n"


def _print_stages(replies: list[Any]) -> None:
    timings = [reply["policy_timing"] for reply in replies]
    rows = [[name.removesuffix("_ms"), f"{median(timing[name] for timing in timings):.2f}"] for name in timings[0]]
    print(table(["stage", "ms (median)"], rows))

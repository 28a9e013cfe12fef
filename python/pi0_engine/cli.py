"""``pi0-engine``: the command line. Each subcommand is a typed dataclass in ``commands/``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from pi0_engine.commands.bench import Bench
from pi0_engine.commands.demo import Demo
from pi0_engine.commands.env import Env
from pi0_engine.commands.eval import Eval
from pi0_engine.commands.infer import Infer
from pi0_engine.commands.kernels import Kernels
from pi0_engine.commands.profile import Profile
from pi0_engine.commands.replay import Replay
from pi0_engine.commands.serve import Serve
from pi0_engine.commands.simulate import Simulate
from pi0_engine.commands.tune import Tune
from pi0_engine.commands.verify import Verify
from pi0_engine.torch_needed import MissingTorch, torch_needed

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Infer, tyro.conf.subcommand("infer")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Simulate, tyro.conf.subcommand("simulate")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Env, tyro.conf.subcommand("env")]
    | Annotated[Kernels, tyro.conf.subcommand("kernels")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 for success, 1 for a failed check, 2 for input that cannot be used."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    command = tyro.cli(
        Command,
        args=arguments,
        prog="pi0-engine",
        description="Run the π0 and π0.5 robot policies: fast, and provably what openpi computes.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        with torch_needed(f"pi0-engine {type(command).__name__.lower()}"):
            return int(command.run())
    except (ValueError, MemoryError, MissingTorch) as error:
        print(f"pi0-engine: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

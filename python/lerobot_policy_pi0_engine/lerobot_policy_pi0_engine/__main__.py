"""``python -m lerobot_policy_pi0_engine SOURCE DESTINATION``: lerobot's own π0 checkpoint, for our policy types.

lerobot's tools take the policy's type from the checkpoint's config.json alone. This makes a directory with that one
line changed; everything else in it is a link to the original.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pi0_engine.checkpoints.hub import resolve_source

TYPES = {"pi0": "pi0_engine", "pi05": "pi05_engine"}


def link_checkpoint(source: str, destination: Path) -> None:
    """Write ``destination``, a new directory, from a checkpoint directory or Hub id.

    Raises:
        ValueError: the source is no π0 or π0.5 checkpoint of lerobot, or the destination exists.
    """
    directory = resolve_source(source, None)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{directory} has no config.json, expected a directory that lerobot's save_pretrained wrote")
    config = json.loads(config_file.read_text())
    if config.get("type") not in TYPES:
        raise ValueError(f"{config_file}: the policy's type is {config.get('type')!r}, expected one of {list(TYPES)}")
    if destination.exists():
        raise ValueError(f"{destination} exists already")
    destination.mkdir(parents=True)
    for entry in directory.iterdir():
        if entry.name != config_file.name:
            (destination / entry.name).symlink_to(entry.resolve())
    # A LoRA adapter is merged by the engine; lerobot would wrap it around a network that does not run.
    changed = {**config, "type": TYPES[config["type"]], "use_peft": False}
    (destination / config_file.name).write_text(json.dumps(changed, indent=4))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_pi0_engine", description=__doc__)
    parser.add_argument("source", help="checkpoint directory or Hub id of type pi0 or pi05")
    parser.add_argument("destination", type=Path, help="directory to make; give it to lerobot as --policy.path")
    arguments = parser.parse_args()
    try:
        link_checkpoint(arguments.source, arguments.destination)
    except ValueError as error:
        parser.error(str(error))
    print(f"--policy.path={arguments.destination}")


if __name__ == "__main__":
    main()

"""A checkpoint's folder: what lies beside the weights, and how its JSON files are read. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def checkpoint_folder(source: str | Path) -> Path:
    """The folder that holds a checkpoint's companions, given that folder, a file in it, or its ``params`` folder."""
    path = Path(source)
    return path.parent if path.is_file() or path.name == "params" else path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError if it is anything else."""
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data

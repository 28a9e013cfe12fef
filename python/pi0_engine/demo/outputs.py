"""Where results go, asked before there are any."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(path: str | Path) -> None:
    """Raise ValueError where no file can be written; one that is there stays as it is."""
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written ({error.strerror}), expected a file in a folder") from error
    if not existed:
        os.unlink(path)

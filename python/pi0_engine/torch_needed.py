"""torch is an extra: what runs a network needs it, what talks to robots and servers does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: Where the torch of a machine comes from. A Jetson's must be NVIDIA's own build; any other has no kernels for it.
WHERE_TORCH_IS = (
    "pip install 'pi0-engine[torch]', but on a Jetson NVIDIA's own build: "
    "pip install torch --index-url https://pypi.jetson-ai-lab.io/jp6/cu126 (docs/gpu.md)"
)


class MissingTorch(ModuleNotFoundError):
    """torch is not installed. The message says what needs it, and how to get it."""


@contextlib.contextmanager
def torch_needed(what: str) -> Iterator[None]:
    """Around imports: where torch is missing, the error says what needs it and how to get it.

    Raises:
        MissingTorch: in place of Python's own error. The innermost of several says it.
    """
    try:
        yield
    except MissingTorch:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise MissingTorch(f"{what} needs torch, which is not installed: {WHERE_TORCH_IS}", name="torch") from error


def why_no_torch() -> str | None:
    """Why torch cannot be imported here, and what to do; None if it can."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return f"not installed ({WHERE_TORCH_IS})"
    except (ImportError, OSError) as error:  # a library of it is missing, or of another machine
        return f"installed, but it cannot be imported: {error}"
    return None


def has_torch() -> bool:
    return why_no_torch() is None


def require_torch(what: str) -> None:
    """Before anything is begun. Raises MissingTorch."""
    with torch_needed(what):
        import torch  # noqa: F401

"""Where nvcc is, as setup.py looks for it."""

from __future__ import annotations

import os
import shutil


def _find() -> str | None:
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


NVCC = _find()

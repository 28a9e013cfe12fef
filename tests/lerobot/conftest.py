"""These tests need lerobot in an environment of its own: ``make test-lerobot``. Elsewhere they are not collected."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile

try:
    importlib.metadata.version("lerobot")
    collect_ignore_glob = []
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["*.py"]

# Nothing comes from the Hub: its cache is empty but for the tokenizer that tests put there. Read when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="pi0-engine-lerobot-")

"""Where a checkpoint is: a local path, a Hugging Face Hub id, or a ``gs://`` address in openpi's download cache."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: What is fetched from the Hub: weights, configs, statistics and tokenizers, but no optimiser states and no pickles.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "params/*", "assets/*"]
_UNWANTED = ["*optimizer*", "training_state/*", "train_state/*"]


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The local file or directory that ``source`` names; a Hub id is downloaded to the Hub's cache first.

    Args:
        source: an existing path, ``owner/name`` on the Hub, or ``gs://bucket/path``. A path that exists wins.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: nothing is there, or the Hub cannot be reached.
    """
    text = os.fspath(source)
    if text.startswith("gs://"):
        return _from_openpi_cache(text, revision)
    path = Path(text).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision!r} was given with the local path {path}; it is for Hub ids only")
        return path
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text):
        raise ValueError(f"{text!r} does not exist; expected a file, a directory, a Hub id (owner/name) or gs://...")
    return _from_hub(text, revision)


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = f" at revision {revision!r}" if revision else ""
    try:
        logger.info("fetching %s%s from the Hugging Face Hub", repo_id, at)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{repo_id!r} is not a local path, and as a Hub id{at} it cannot be loaded "
            f"(offline, private, gated or misspelt?): {type(error).__name__}: {first_line}"
        ) from error


def _from_openpi_cache(url: str, revision: str | None) -> Path:
    if revision is not None:
        raise ValueError(f"revision {revision!r} was given with {url}; it is for Hub ids only")
    cache = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    path = cache / url.removeprefix("gs://").strip("/")
    if not path.exists():
        raise ValueError(
            f"{url} is not in openpi's cache ({path}). Fetch it once: "
            f"mkdir -p {path.parent} && gcloud storage cp -r {url.rstrip('/')} {path.parent}/"
        )
    logger.info("%s: using openpi's copy in %s", url, path)
    return path

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
    from huggingface_hub import errors, snapshot_download

    def snapshot(*, local_files_only: bool) -> Path:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=local_files_only,
        )
        return Path(folder)

    at = f" at revision {revision!r}" if revision else ""
    logger.info("fetching %s%s from the Hugging Face Hub", repo_id, at)
    # Every exception: those of the transport are requests' in huggingface_hub 0, httpx's in 1 and httpx2's in 2.
    try:
        return snapshot(local_files_only=False)
    except Exception as error:
        reason = error
    # From 1.33 on a commit's files are listed online even where all of them are in the cache. Those versions notice a
    # snapshot that is there in part; older ones look into the cache by themselves, and would return it.
    incomplete = getattr(errors, "IncompleteSnapshotError", None)
    if incomplete is not None:
        try:
            found = snapshot(local_files_only=True)
            logger.info("the Hub gives nothing (%s): using its cache, %s", type(reason).__name__, found)
            return found
        except incomplete as error:
            reason = error
        except Exception:
            pass  # nothing is there, and what the Hub said is the reason
    first_line = (str(reason).strip() or "no reason given").splitlines()[0]
    raise ValueError(
        f"{repo_id!r} is not a local path, and as a Hub id{at} it cannot be loaded "
        f"(offline, private, gated or misspelt?): {type(reason).__name__}: {first_line}"
    ) from reason


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

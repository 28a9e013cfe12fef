"""Where the tokenizer of a checkpoint lies: beside it, or in the caches of openpi and Hugging Face."""

from __future__ import annotations

import logging
import os
from importlib import resources
from pathlib import Path

from pi0_engine.checkpoints.folder import checkpoint_folder

logger = logging.getLogger(__name__)

#: Names of tokenizer files, preferred first. The first two are sentencepiece models and load faster.
TOKENIZER_FILES = ("paligemma_tokenizer.model", "tokenizer.model", "tokenizer.json")
#: PaliGemma's repository on the Hub: its tokenizer files equal openpi's. Gated: it needs an accepted licence.
HUB_REPO = "google/paligemma-3b-pt-224"
_PUBLIC_URL = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"


def tokenizer_in(folder: Path) -> Path | None:
    """The preferred tokenizer file directly in a folder, or None."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def demo_tokenizer() -> Path:
    """A small sentencepiece model (1024 pieces, bos 2) for models with random weights; it is in the package."""
    return Path(str(resources.files("pi0_engine") / "data" / "demo_tokenizer.model"))


def find_tokenizer(checkpoint: str | Path | None = None) -> Path:
    """The PaliGemma tokenizer that π0 and π0.5 checkpoints share.

    Looks beside the checkpoint, in its ``tokenizer/`` folder (newer lerobot saves), in openpi's cache
    (``OPENPI_DATA_HOME``, default ``~/.cache/openpi``) and in the Hugging Face cache; then, only where a token for
    the Hub is configured and ``HF_HUB_OFFLINE`` is not set, downloads it from the Hub.

    Raises:
        ValueError: found nowhere; says where it looked and how to get it.
    """
    looked: list[str] = []
    folders = []
    if checkpoint is not None:
        folder = checkpoint_folder(checkpoint)
        folders += [folder, folder / "tokenizer"]
    data_home = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    folders.append(data_home / "big_vision")
    for place in folders:
        looked.append(str(place))
        if (file := tokenizer_in(place)) is not None:
            logger.info("tokenizer: %s", file)
            return file
    from_hub, reason = _from_hub()
    if from_hub is not None:
        logger.info("tokenizer: %s", from_hub)
        return from_hub
    looked.append(f"{HUB_REPO} on the Hugging Face Hub ({reason})")
    target = data_home / "big_vision" / "paligemma_tokenizer.model"
    raise ValueError(
        f"no tokenizer found; looked in {'; '.join(looked)}. Get it once with\n"
        f"  curl --create-dirs -o {target} {_PUBLIC_URL}\n"
        f"or accept the licence of {HUB_REPO}, set HF_TOKEN, and run again"
    )


def _from_hub() -> tuple[Path | None, str]:
    """The Hub's tokenizer, or None and why not."""
    import huggingface_hub
    from huggingface_hub import constants

    for name in TOKENIZER_FILES[1:]:
        cached = huggingface_hub.try_to_load_from_cache(HUB_REPO, name)
        if isinstance(cached, str):
            return Path(cached), ""
    if constants.HF_HUB_OFFLINE:
        return None, "not in its cache, and HF_HUB_OFFLINE is set"
    if huggingface_hub.get_token() is None:
        return None, "not in its cache, and no HF_TOKEN is set"
    try:
        return Path(huggingface_hub.hf_hub_download(HUB_REPO, TOKENIZER_FILES[1])), ""
    except Exception as error:  # its transport's are another library's with each major version
        return None, f"download failed: {error}"

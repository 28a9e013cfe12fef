"""The normalisation statistics that belong to a checkpoint: which file holds them, and openpi's format of it."""

from __future__ import annotations

import logging
from pathlib import Path

from pi0_engine.checkpoints.folder import checkpoint_folder, read_json
from pi0_engine.config import Pi0Config
from pi0_engine.robots.lerobot_processors import load_lerobot_stats
from pi0_engine.robots.normalization import Normalizer, NormStats, build_with_context

logger = logging.getLogger(__name__)


def load_norm_stats(source: str | Path, config: Pi0Config, *, asset_id: str | None = None) -> NormStats:
    """The statistics that belong to a checkpoint.

    Looks, in this order, for lerobot's ``policy_preprocessor.json`` (with ``policy_postprocessor.json``),
    ``norm_stats.json``, and ``assets/<asset_id>/norm_stats.json``. With ``asset_id`` only the last is considered.
    openpi's files do not name a mode: π0 is z-score, π0.5 quantile. lerobot's files do, and are obeyed.

    Args:
        source: the checkpoint's folder (its ``params`` folder or a file in it count as that folder), or a
            ``norm_stats.json``.
        config: tells π0 from π0.5.
        asset_id: which of several statistics in ``assets/`` to take, e.g. ``"trossen"``.

    Raises:
        ValueError: nothing found (names every place searched), several asset ids and none chosen, a statistic that
            is missing, not finite, negative where it cannot be, or of another length than its partner.
    """
    path = Path(source)
    if path.is_file() and path.name == "norm_stats.json":
        return _load_openpi(path, config)
    folder = checkpoint_folder(path)
    if asset_id is None and (folder / "policy_preprocessor.json").is_file():
        stats = load_lerobot_stats(folder)
    elif asset_id is None and (folder / "norm_stats.json").is_file():
        stats = _load_openpi(folder / "norm_stats.json", config)
    else:
        stats = _load_openpi(_asset_file(folder, asset_id), config)
    logger.info("normalisation: %s/%s from %s", stats.state.mode, stats.actions.mode, stats.source)
    return stats


def _asset_file(folder: Path, asset_id: str | None) -> Path:
    assets = folder / "assets"
    found = sorted(path.parent.relative_to(assets).as_posix() for path in assets.rglob("norm_stats.json"))
    if asset_id is None and not found:
        looked = ["policy_preprocessor.json", "norm_stats.json", "assets/<asset_id>/norm_stats.json"]
        raise ValueError(
            f"no normalisation statistics in {folder}: looked for {', '.join(looked)}. Without them the actions are in "
            "the wrong units. Put the file there or name it; NormStats.identity() says that none are wanted"
        )
    if asset_id is None and len(found) > 1:
        raise ValueError(f"{assets} has statistics for {found}: choose one with asset_id")
    chosen = found[0] if asset_id is None else asset_id
    if chosen not in found:
        raise ValueError(f"asset_id is {chosen!r}, but {assets} has statistics for {found or 'nothing'}")
    return assets / chosen / "norm_stats.json"


def _load_openpi(path: Path, config: Pi0Config) -> NormStats:
    data = read_json(path)
    groups = data.get("norm_stats")
    if not isinstance(groups, dict):
        raise ValueError(f"{path} has keys {sorted(data)}, expected 'norm_stats' with 'state' and 'actions'")
    first, second = ("q01", "q99") if config.is_pi05 else ("mean", "std")
    build = Normalizer.quantile if config.is_pi05 else Normalizer.zscore
    parts = []
    for name in ("state", "actions"):
        values = groups.get(name)
        values = values if isinstance(values, dict) else {}
        missing = [key for key in (first, second) if values.get(key) is None]
        if missing:
            raise ValueError(f"{path}: norm_stats.{name} lacks {missing}, which a {config.model_type} checkpoint needs")
        parts.append(build_with_context(f"{path}: norm_stats.{name}", build, values[first], values[second]))
    return NormStats(parts[0], parts[1], str(path))

"""Where checkpoints come from, without a network: the Hub's cache, openpi's cache, the errors when neither helps."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.checkpoints.hub import resolve_source
from tests.support.checkpoints import tiny_config, write_openpi
from tests.support.paths import DATA

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(params=["told to be offline", "no connection"])
def hub_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network: huggingface_hub knows it, or finds out."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    if request.param == "told to be offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unheard.getsockname()[1]}")
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between its five tries: 23 s in all
    return cache


def test_hub_id_with_a_revision(hub_cache: Path) -> None:
    repository = hub_cache / "models--someone--pi0-tiny"
    write_openpi(repository / "snapshots" / COMMIT, tiny_config("pi0"))
    (repository / "refs").mkdir()
    (repository / "refs/v2").write_text(COMMIT)
    checkpoint = open_checkpoint("someone/pi0-tiny", revision="v2")
    assert checkpoint.config == tiny_config("pi0")
    assert checkpoint.path == repository / "snapshots" / COMMIT
    assert open_checkpoint("someone/pi0-tiny", revision=COMMIT).path == checkpoint.path
    with pytest.raises(ValueError, match=r"'someone/pi0-tiny' .* at revision 'v3' it cannot be loaded \(offline"):
        open_checkpoint("someone/pi0-tiny", revision="v3")


def test_a_snapshot_that_is_there_in_part_is_not_opened(hub_cache: Path) -> None:
    """As an interrupted download leaves it: huggingface_hub 1.33 and newer write down first what they will fetch."""
    tree = pytest.importorskip("huggingface_hub._tree_cache", reason="this version keeps no list of what it fetches")
    repository = hub_cache / "models--someone--pi0-tiny"
    snapshot = repository / "snapshots" / COMMIT
    write_openpi(snapshot, tiny_config("pi0"))
    there = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    entry = tree.TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    tree.write_tree_cache(str(repository), COMMIT, dict.fromkeys(there, entry))
    assert open_checkpoint("someone/pi0-tiny", revision=COMMIT).path == snapshot
    tree.write_tree_cache(str(repository), COMMIT, dict.fromkeys([*there, "assets/norm_stats.json"], entry))
    with pytest.raises(ValueError, match=r"is incomplete: 1 file\(s\) are missing \(assets/norm_stats.json\)"):
        open_checkpoint("someone/pi0-tiny", revision=COMMIT)


def test_hub_id_when_offline(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"'someone/else' is not a local path, and as a Hub id it cannot be loaded"):
        open_checkpoint("someone/else")


@pytest.mark.parametrize("source", ["not-there", "/not/there", "./a/b", "a/b/c", Path("owner/name"), "owner/na me"])
def test_paths_that_do_not_exist(source: str | Path) -> None:
    with pytest.raises(ValueError, match="does not exist; expected a file, a directory, a Hub id"):
        open_checkpoint(source)


def test_a_local_path_wins_and_takes_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert resolve_source("owner/name") == Path("owner/name")
    with pytest.raises(ValueError, match="revision 'main' was given with the local path owner/name"):
        resolve_source("owner/name", "main")


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/") == tmp_path


def test_google_storage_is_looked_up_in_openpis_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "gs://openpi-assets/checkpoints/pi05_tiny"
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{url} is not in openpi's cache .*gcloud storage cp -r {url} {tmp_path}"):
        open_checkpoint(url)
    data = DATA / "checkpoints/pi05_tiny_orbax"
    shutil.copytree(data, tmp_path / "openpi-assets/checkpoints/pi05_tiny")
    assert resolve_source(f"{url}/") == tmp_path / "openpi-assets/checkpoints/pi05_tiny"
    with pytest.raises(ValueError, match="it is for Hub ids only"):
        resolve_source(url, "main")

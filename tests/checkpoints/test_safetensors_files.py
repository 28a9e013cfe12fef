"""The mapping of safetensors files: views of the file, pages handed back, shards, damage."""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.checkpoints.safetensors_files import MappedSafetensors
from tests.support.checkpoints import (
    assert_holds_the_seeded_weights,
    openpi_tensors,
    tiny_config,
    write_openpi,
    write_shapes,
)

PI0 = tiny_config("pi0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[: len(whole) // 2], "damaged, truncated or not a safetensors file"),
        (lambda whole: whole[:100], "damaged, truncated or not a safetensors file"),
        (lambda whole: whole[:4], "damaged, truncated or not a safetensors file"),
        (lambda whole: b"\x80\x04 a pickle under another name", "damaged, truncated or not a safetensors file"),
        (lambda whole: whole + b"surplus", "damaged, truncated or not a safetensors file"),
    ],
)
def test_damaged_files(tmp_path: Path, content: object, message: str) -> None:
    file = write_openpi(tmp_path, PI0) / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_shards_named_by_an_index(tmp_path: Path) -> None:
    tensors = openpi_tensors(PI0)
    keys = list(tensors)
    shards = {"model-1-of-2.safetensors": keys[::2], "model-2-of-2.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({key: tensors[key] for key in part}, tmp_path / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_holds_the_seeded_weights(open_checkpoint(tmp_path, config=PI0), PI0)

    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not in this directory: \['model-2-of-2\.safetensors'\]"):
        open_checkpoint(tmp_path, config=PI0)
    folder = tmp_path / "model"
    (folder / "deeper").mkdir(parents=True)
    for outside in ("../model-1-of-2.safetensors", str(tmp_path / "model-1-of-2.safetensors"), "deeper/a.safetensors"):
        (folder / "deeper" / "a.safetensors").write_bytes((tmp_path / "model-1-of-2.safetensors").read_bytes())
        assert (folder / outside).is_file()  # it is there, and not for this checkpoint to read
        (folder / index.name).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, outside)}))
        with pytest.raises(ValueError, match="not in this directory"):
            open_checkpoint(folder, config=PI0)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index of safetensors shards"):
        open_checkpoint(tmp_path, config=PI0)


def test_a_parameter_under_two_spellings_is_refused(tmp_path: Path) -> None:
    tensors = openpi_tensors(PI0)
    tensors["model.action_in_proj.bias"] = tensors["action_in_proj.bias"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are the same parameter"):
        open_checkpoint(tmp_path, config=PI0)


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_openpi(tmp_path, PI0))
    first, again = checkpoint.tensor("projector.weight"), checkpoint.tensor("projector.weight")
    assert first.data_ptr() == again.data_ptr()
    assert first.untyped_storage().nbytes() == (tmp_path / "model.safetensors").stat().st_size


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    write_shapes(path, {"a": (3,)})
    content = path.read_bytes()
    header = content[8:-6] + b" " * ((len(content) - 6) % 2 == 0)
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<3H", 0x3F80, 0x4000, 0x4040))
    assert path.stat().st_size % 2 == 1, "the data starts at an odd byte"
    assert MappedSafetensors(path).tensor("a").tolist() == [1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mapping's resident size from /proc")
def test_pages_of_earlier_tensors_are_handed_back(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    save_file({str(i): torch.full((1 << 20,), float(i)) for i in range(8)}, path)

    def resident_mb() -> float:
        smaps = Path("/proc/self/smaps").read_text()
        entry = re.search(rf"{re.escape(str(path))}\n.*?^Rss:\s+(\d+) kB", smaps, re.DOTALL | re.MULTILINE)
        assert entry is not None
        return int(entry[1]) / 1024

    file = MappedSafetensors(path)
    for i in range(8):
        assert file.tensor(str(i)).sum() == i << 20
        assert resident_mb() < 5, "one tensor of 4 MB, not all that were read"
    first, last = file.tensor("0"), file.tensor("7")
    assert (first == 0).all() and (last == 7).all(), "tensors handed out before stay readable"

    file = MappedSafetensors(path)
    with ThreadPoolExecutor(2) as pool:
        both_have_one = threading.Barrier(2, timeout=60)

        def read_four(start: int) -> None:
            for i in range(start, 8, 2):
                tensor = file.tensor(str(i))
                both_have_one.wait()  # the other thread has asked for its tensor before this one is touched
                assert tensor.sum() == i << 20
                both_have_one.wait()
                assert resident_mb() < 9, "one tensor per thread"

        list(pool.map(read_four, (0, 1)))

"""safetensors files in openpi's and lerobot's layouts, memory-mapped: no tensor is read before it is used."""

from __future__ import annotations

import json
import mmap
import struct
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pi0_engine.checkpoints.names import (
    EMBEDDING_KEY,
    TIED_EMBEDDING_KEY,
    UNUSED_KEYS,
    canonical_name,
    normalize_key,
    openpi_name,
)
from pi0_engine.checkpoints.stored import StoredModel, StoredTensor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX_NAME = "model.safetensors.index.json"


class MappedSafetensors:
    """One safetensors file mapped read-only; tensors are views of the mapping.

    safetensors itself checks the file (header, offsets, length). The mapping is ours so that pages can be handed back:
    when a tensor is asked for, everything that was read before leaves this process. It stays in the page cache, and a
    later use simply maps it again. A consumer that copies tensor by tensor, in any number of threads, never has the
    whole file resident.

    Raises:
        ValueError: empty, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        _check_file(path)
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            self.header: dict[str, dict[str, Any]] = json.loads(file.read(header_bytes))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header.pop("__metadata__", None)
        self._data_start = 8 + header_bytes
        with warnings.catch_warnings():  # torch has no read-only tensors and warns; nothing here writes
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor of this key, a view of the mapped file in the stored dtype. Do not write to it."""
        entry = self.header[key]
        begin, end = (self._data_start + offset for offset in entry["data_offsets"])
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        dtype = _DTYPES[entry["dtype"]]
        flat = self._bytes[begin:end]
        if begin % dtype.itemsize:  # the format leaves alignment to the writer
            flat = flat.clone()
        return flat.view(dtype).view(entry["shape"])


def read_safetensors(paths: list[Path], where: str) -> StoredModel:
    """The model in safetensors files with openpi's or lerobot's names.

    Raises:
        ValueError: a file is damaged, or two tensors have the same name.
    """
    return name_tensors((stored for path in paths for stored in read_tensors(path).values()), where)


def name_tensors(tensors: Iterable[StoredTensor], where: str) -> StoredModel:
    """The model that tensors with openpi's or lerobot's keys make up, whether they lie in files or in memory.

    Raises:
        ValueError: two tensors have the same name.
    """
    entries: dict[str, StoredTensor] = {}
    for stored in tensors:
        name = normalize_key(stored.key)
        if name in entries:
            raise ValueError(f"{where}: tensors {entries[name].key!r} and {stored.key!r} are the same parameter")
        entries[name] = stored
    ignored = [entries.pop(name).key for name in UNUSED_KEYS if name in entries]
    if EMBEDDING_KEY in entries and TIED_EMBEDDING_KEY in entries:
        ignored.append(entries.pop(TIED_EMBEDDING_KEY).key)
    if TIED_EMBEDDING_KEY in entries:
        entries[EMBEDDING_KEY] = entries.pop(TIED_EMBEDDING_KEY)
    named: dict[str, StoredTensor] = {}
    unexpected = []
    for name, stored in entries.items():
        canonical = canonical_name(name)
        if canonical is None:
            unexpected.append(stored.key)
        else:
            named[canonical] = stored
    return StoredModel(where, named, tuple(ignored), tuple(unexpected), key_of=openpi_name)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """{key: tensor} of one file in the order of its bytes."""
    file = MappedSafetensors(path)
    in_file_order = sorted(file.header.items(), key=lambda item: item[1]["data_offsets"])
    names = {code: str(dtype).removeprefix("torch.") for code, dtype in _DTYPES.items()}
    tensors = {}
    for key, entry in in_file_order:
        dtype = names.get(entry["dtype"], entry["dtype"].lower())
        tensors[key] = StoredTensor(key, tuple(entry["shape"]), dtype, partial(file.tensor, key))
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: ``model.safetensors``, or the shards named by its index; [] if neither.

    Raises:
        ValueError: an index that is damaged or names a file that is not there.
    """
    single, index = directory / "model.safetensors", directory / INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    absent = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not in this directory: {absent}")
    return [directory / name for name in names]


def _check_file(path: Path) -> None:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} ({size} bytes) is damaged, truncated or not a safetensors file: {error}") from error

"""Arrays inside an orbax directory (zarr in an OCDBT key-value store), read a few rows of the first axis at a time.

orbax stacks the layers of a tower along the first axis and usually writes the whole stack as one compressed chunk: the
MLP of a 2B Gemma is a single chunk of 4.8 GB in float32. Reading it as a whole needs that much memory and the
compressed bytes on top. The layers lie one after another in the decompressed bytes, though, so a decoder that is kept
open per chunk yields them in order, and only the layer at hand is in memory.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "<f4": torch.float32,
    "float32": torch.float32,
    "<f2": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_PIECE_BYTES = 1 << 20


class ZarrArray:
    """One array of the store.

    Attributes:
        key: its name in the store.
        shape: its shape.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, or the name that zarr has for anything else.
    """

    def __init__(self, store: Any, spec: dict[str, Any], key: str, metadata: dict[str, Any]) -> None:
        self.key = key
        self.shape = tuple(metadata["shape"])
        code = str(metadata.get("dtype", metadata.get("data_type")))
        self._dtype = _DTYPES.get(code)
        self.dtype = code if self._dtype is None else str(self._dtype).removeprefix("torch.")
        self._store, self._spec, self._metadata = store, spec, metadata
        self._chunks: dict[tuple[int, ...], _ChunkDecoder] = {}
        self._lock = threading.Lock()

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the first axis. Ascending calls decode each chunk once.

        Raises:
            ValueError: damaged or missing data.
        """
        assert self._dtype is not None
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self._dtype)
        try:
            with self._lock:
                if self._is_streamable():
                    self._decode_rows(start, stop, rows)
                else:
                    self._read_with_tensorstore(start, stop, rows)
                if stop == self.shape[0]:
                    self._chunks.clear()
        except (ValueError, OSError, RuntimeError, _zstd_error()) as error:
            raise ValueError(f"array {self.key} cannot be read, its data is damaged or missing: {error}") from error
        return rows

    def _is_streamable(self) -> bool:
        compressor = self._metadata.get("compressor")
        return (
            self._metadata["zarr_format"] == 2
            and self._metadata["order"] == "C"
            and not self._metadata.get("filters")
            and not self._metadata.get("fill_value")
            and (compressor is None or compressor["id"] == "zstd")
        )

    def _decode_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        chunk_shape = self._metadata["chunks"]
        grid = [range(math.ceil(size / chunk)) for size, chunk in zip(self.shape[1:], chunk_shape[1:], strict=True)]
        rows_per_chunk = chunk_shape[0]
        while start < stop:
            block, first = divmod(start, rows_per_chunk)
            count = min(stop - start, rows_per_chunk - first)
            target, out = out[:count], out[count:]
            for index in itertools.product(*grid):
                region = tuple(
                    slice(i * chunk, min((i + 1) * chunk, size))
                    for i, chunk, size in zip(index, chunk_shape[1:], self.shape[1:], strict=True)
                )
                decoder = self._decoder((block, *index))
                part = target[(slice(None), *region)]
                if part.is_contiguous() and list(part.shape[1:]) == chunk_shape[1:]:
                    decoder.read_into(first, part)
                else:  # chunks at the edge of the array are stored at full size
                    whole = torch.empty((count, *chunk_shape[1:]), dtype=out.dtype)
                    decoder.read_into(first, whole)
                    part.copy_(whole[(slice(None), *(slice(r.stop - r.start) for r in region))])
            start += count

    def _decoder(self, index: tuple[int, ...]) -> _ChunkDecoder:
        for done in [key for key in self._chunks if key[0] != index[0]]:
            del self._chunks[done]
        if index not in self._chunks:
            separator = self._metadata.get("dimension_separator", ".")
            key = f"{self.key}/{separator.join(map(str, index))}"
            self._chunks[index] = _ChunkDecoder(self._store, key, compressed=self._metadata["compressor"] is not None)
        return self._chunks[index]

    def _read_with_tensorstore(self, start: int, stop: int, out: torch.Tensor) -> None:
        import tensorstore

        driver = "zarr" if self._metadata["zarr_format"] == 2 else "zarr3"
        spec = {"driver": driver, "kvstore": {**self._spec, "path": f"{self.key}/"}}
        array = tensorstore.open(spec, open=True, read=True).result()[start:stop].read().result()
        out.view(torch.uint8).view(-1).numpy()[:] = array.reshape(-1).view("uint8")


class _ChunkDecoder:
    """The decompressed bytes of one chunk as a stream; going back starts over."""

    def __init__(self, store: Any, key: str, compressed: bool) -> None:
        self._store, self._key, self._compressed = store, key, compressed
        self._stream: Any = None
        self._position = 0

    def read_into(self, first_row: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` (contiguous) with the rows from ``first_row`` on."""
        target = rows.view(-1).view(torch.uint8).numpy().data
        begin = first_row * (len(target) // rows.shape[0])
        if self._stream is None or begin < self._position:
            self._open()
        if self._stream is None:  # orbax may leave out chunks that hold nothing but the fill value, zero
            rows.zero_()
            return
        while self._position < begin:
            self._read(memoryview(bytearray(min(_PIECE_BYTES, begin - self._position))))
        self._read(target)

    def _open(self) -> None:
        raw = _StoredBytes(self._store, self._key)
        self._position = 0
        if raw.is_missing:
            self._stream = None
        elif self._compressed:
            import zstandard

            source = io.BufferedReader(raw, _PIECE_BYTES)
            self._stream = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
        else:
            self._stream = raw

    def _read(self, target: memoryview) -> None:
        while target:
            count = self._stream.readinto(target[:_PIECE_BYTES])
            if not count:
                raise ValueError(f"{self._key} ends early")
            self._position += count
            target = target[count:]


class _StoredBytes(io.RawIOBase):
    """One value of the store as a readable file, fetched piece by piece where tensorstore can."""

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key = store, key
        self._offset = 0
        self._whole: bytes | None = None
        try:
            first = store.read(key, byte_range=slice(0, 1)).result()
        except TypeError:  # older tensorstore (Python 3.10 has no newer one) reads whole values only
            first = store.read(key).result()
            self._whole = first.value
        self.is_missing = first.state == "missing"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._piece(self._offset, self._offset + len(buffer))
        buffer[: len(piece)] = piece
        self._offset += len(piece)
        return len(piece)

    def _piece(self, begin: int, end: int) -> bytes:
        if self._whole is not None:
            return self._whole[begin:end]
        try:
            piece = self._store.read(self._key, byte_range=slice(begin, end)).result().value
        except ValueError:  # beyond the end, which the store does not tell beforehand: take what is left
            piece = self._store.read(self._key, byte_range=slice(begin, None)).result().value
        return bytes(piece)


def open_arrays(directory: Path) -> dict[str, ZarrArray]:
    """{key: array} of an orbax OCDBT directory, in the order of the store.

    Raises:
        ValueError: the packages that read it are not installed, or the directory is damaged.
    """
    try:
        import tensorstore
        import zstandard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{directory} is a JAX (orbax) checkpoint: reading it needs tensorstore and zstandard, "
            f"pip install 'pi0-engine[jax]' ({error})"
        ) from error

    spec = {"driver": "ocdbt", "base": f"file://{directory.resolve()}/"}
    arrays = {}
    try:
        store = tensorstore.KvStore.open(spec).result()
        for entry in sorted(store.list().result()):
            key, _, file = entry.decode().rpartition("/")
            if file in (".zarray", "zarr.json"):
                arrays[key] = ZarrArray(store, spec, key, json.loads(store.read(entry).result().value))
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{directory} is damaged or not an orbax checkpoint: {error}") from error
    return arrays


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError

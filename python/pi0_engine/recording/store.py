"""The folder of a recording, for writing: segments that come and go within a bound (docs/recording.md)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pi0_engine.recording.files import (
    FORMAT,
    FORMAT_VERSION,
    LINES_FILE,
    METADATA_FILE,
    pack_record,
    read_metadata,
    segments,
    tensor_file,
)

#: A recording has at least this many segments when it is full, so that rotation forgets an eighth of it at a time.
_SEGMENTS = 8


class SegmentStore:
    """The folder: the segment in use, the size of each, and a lock on all of it."""

    def __init__(self, directory: Path, metadata: Mapping[str, Any], max_bytes: int) -> None:
        self.directory, self._max_bytes = directory, max_bytes
        self._lock_file = _claim(directory, metadata)
        self._sizes = {segment: _size(segment) for segment in segments(directory)}
        self._current: Path | None = None
        self._count = 0

    def append(self, line: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """The tensors, then the line that says they are whole. After an error the next record has a new segment."""
        self._count += 1
        text, tensors = pack_record(self._count, line, arrays)
        size = len(text) + len(tensors)
        if size > self._max_bytes:
            raise ValueError(f"a record of {size} bytes, expected at most {self._max_bytes}")
        used = 0 if self._current is None else self._sizes[self._current]
        segment = self._begin() if self._current is None or used + size > self._share(used) else self._current
        while sum(self._sizes.values()) + size > self._max_bytes:
            self._delete(min(self._sizes, key=_number))
        path = tensor_file(segment, self._count)
        try:
            path.write_bytes(tensors)
            with (segment / LINES_FILE).open("ab") as file:
                file.write(text)
        except OSError:
            self._current = None
            if self._sizes[segment] == 0:  # or a full disk would collect empty segments
                self._delete(segment)
            else:
                path.unlink(missing_ok=True)
                self._sizes[segment] = _size(segment)
            raise
        self._sizes[segment] += size

    def close(self) -> None:
        os.close(self._lock_file)

    def _share(self, used: int) -> int:
        """How large a segment may become; an empty one takes any record."""
        return self._max_bytes // _SEGMENTS if used else self._max_bytes

    def _begin(self) -> Path:
        number = 1 + max(map(_number, self._sizes), default=0)
        segment = self.directory / f"segment-{number:06d}"
        segment.mkdir()
        self._sizes[segment] = 0
        self._current = segment
        return segment

    def _delete(self, segment: Path) -> None:
        """Its line file first: a reader then knows of none of its records."""
        for path in [segment / LINES_FILE, *segment.glob("*.safetensors")]:
            path.unlink(missing_ok=True)
        del self._sizes[segment]
        with contextlib.suppress(OSError):  # somebody put something else into it
            segment.rmdir()


def _number(segment: Path) -> int:
    return int(segment.name.removeprefix("segment-"))


def _size(segment: Path) -> int:
    return sum(path.stat().st_size for path in segment.iterdir())


def _claim(directory: Path, metadata: Mapping[str, Any]) -> int:
    """Make the folder a recording with this metadata, or see that it is one, and lock it. Returns the lock's file."""
    content = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **metadata}))
    path = directory / METADATA_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(directory.iterdir()):
                raise ValueError(f"{directory} is not empty and not a recording; expected a new folder")
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(content, indent=2))
            draft.replace(path)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot record into {directory}: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        recorded = read_metadata(directory)
        different = sorted(key for key in {*content, *recorded} if content.get(key) != recorded.get(key))
        if different:
            raise ValueError(f"{directory} is a recording of something else: {different} differ; give another folder")
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process records into {directory}") from None
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor

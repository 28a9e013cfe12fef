"""Recordings on disk: what a record is, how it is written, and how a folder of them is read (docs/recording.md).

A record is a safetensors file of its arrays and one JSON line of everything else. The line is written last and holds
the file's size and checksum, so that a record is either whole or recognised as torn. There is no pickle.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pi0_engine.rtc.schedule import Leftover

FORMAT = "pi0-engine recording"
FORMAT_VERSION = 1
METADATA_FILE = "recording.json"
LINES_FILE = "records.jsonl"
SEGMENT = re.compile(r"segment-(\d{6,})")

#: What a reader takes from a folder that anybody may have written.
_MAX_METADATA = _MAX_HEADER = 1 << 20
_MAX_LINE = 16 << 20
_MAX_TENSORS = 1 << 30
_MAX_DEPTH = 32

_DTYPES = frozenset(
    {"bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
)


@dataclass(frozen=True, eq=False)
class Record:
    """One inference: everything that decides its result, and the result.

    Attributes:
        observation: as the robot sent it: maps, arrays, text and numbers.
        reply: as it was answered, with ``actions``; or ``error``, a map of ``code`` and ``message``.
        noise, seed: what the chunk started from, as given to ``Pi0Policy.infer``; exactly one of them.
        prompt: the instruction given beside the observation; None takes the observation's or the robot's.
        num_samples, num_steps: as given to ``Pi0Policy.infer``.
        leftover: of the chunk in execution, as given to ``Pi0Policy.infer``.
        control: the request's own wishes, apart from the observation.
        latency_ms: from request to reply.
        time: of the reply, in seconds since 1970.
        name: where a reader found it: segment and number.
    """

    observation: Mapping[str, Any]
    reply: Mapping[str, Any]
    noise: NDArray[np.floating[Any]] | None = None
    seed: int | None = None
    prompt: str | None = None
    num_samples: int = 1
    num_steps: int | None = None
    leftover: Leftover | None = None
    control: Mapping[str, Any] = field(default_factory=dict)
    latency_ms: float | None = None
    time: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        if (self.noise is None) == (self.seed is None):
            raise ValueError(
                "a record needs the noise or the seed of its chunk, exactly one: without it nothing repeats"
            )


#: What a record is made of, apart from its leftover; None may be any of the first group.
_OPTIONAL: dict[str, Any] = {
    "noise": np.ndarray,
    "seed": int,
    "prompt": str,
    "num_steps": int,
    "latency_ms": (int, float),
}
_REQUIRED: dict[str, Any] = {
    "observation": dict,
    "reply": dict,
    "control": dict,
    "num_samples": int,
    "time": (int, float),
}


def encode_record(record: Record) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The JSON line of a record, without size and checksum, and copies of its arrays by name.

    Raises:
        ValueError: a value that is no map, list, text, bytes, number, bool, None or array of numbers, named.
    """
    arrays: dict[str, NDArray[Any]] = {}
    line = {name: _encode(getattr(record, name), name, arrays) for name in (*_OPTIONAL, *_REQUIRED)}
    if record.leftover is not None:
        leftover = {"actions": record.leftover.actions, "delay": record.leftover.delay}
        line["leftover"] = _encode(leftover, "leftover", arrays)
    return line, arrays


def pack_record(number: int, line: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> tuple[bytes, bytes]:
    """The line and the safetensors file as bytes, ready to be written: the file first.

    Raises:
        ValueError: more than a reader would take.
    """
    tensors = save_safetensors(dict(arrays))
    full = {"record": number, **line, "tensor_bytes": len(tensors), "tensor_crc32": zlib.crc32(tensors)}
    text = json.dumps(full, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    if len(text) >= _MAX_LINE or len(tensors) > _MAX_TENSORS or _header(tensors) > _MAX_HEADER:
        raise ValueError(f"a record of {len(text)} bytes of text and {len(tensors)} of arrays is too large")
    return text, tensors


def _header(tensors: bytes) -> int:
    """Length of a safetensors file's header."""
    return int.from_bytes(tensors[:8], "little")


def _encode(value: Any, name: str, arrays: dict[str, NDArray[Any]], depth: int = 0) -> Any:
    """JSON in which every object is a tag: {"map"}, {"array"}, {"bytes"}, {"float"}. No key can be mistaken for one."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name} is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not isinstance(value, np.floating):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name} has keys {list(value)!r:.200}, expected text")
        return {"map": {key: _encode(entry, f"{name}/{key}", arrays, depth + 1) for key, entry in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_encode(entry, f"{name}/{i}", arrays, depth + 1) for i, entry in enumerate(value)]
    if not isinstance(value, (np.ndarray, np.generic)):
        raise ValueError(f"{name} is {type(value).__name__}, which a recording cannot hold")
    if value.ndim == 0 and value.dtype.kind in "US":
        return _encode(value.item(), name, arrays, depth)
    if value.dtype.newbyteorder("=").name not in _DTYPES:
        raise ValueError(f"{name} is an array of {value.dtype}, expected one of {sorted(_DTYPES)}")
    while name in arrays:  # {"a/b": x, "a": {"b": y}}
        name += "~"
    arrays[name] = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
    return {"array": name}


def _decode(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, arrays) for entry in value]
    if not isinstance(value, dict):
        return value
    (tag, content) = next(iter(value.items())) if len(value) == 1 else ("", None)
    if tag == "map" and isinstance(content, dict):
        return {key: _decode(entry, arrays) for key, entry in content.items()}
    if tag == "array" and isinstance(content, str) and content in arrays:
        return arrays[content]
    if tag == "float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if tag == "bytes" and isinstance(content, str):
        return base64.b64decode(content, validate=True)
    raise ValueError(f"{value!r:.200} is no value of a recording")


class Recording:
    """A folder of records, for reading. Torn records are skipped; ``skipped`` says which and why, after iteration.

    Raises:
        ValueError: a folder that is not a recording. Iteration raises it at a record that is whole and yet wrong: such
            a thing was not left by a crash.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.metadata = read_metadata(self.directory)
        self.skipped: list[str] = []

    def __len__(self) -> int:
        """Lines, torn ones included."""
        return sum(1 for segment in segments(self.directory) for _ in _lines(segment))

    def __iter__(self) -> Iterator[Record]:
        """Oldest first."""
        self.skipped = []
        for segment in segments(self.directory):
            unclaimed = {path.name for path in segment.glob("*.safetensors")}
            for text in _lines(segment):
                try:
                    line = _parsed(text)
                    path = tensor_file(segment, line["record"])
                    unclaimed.discard(path.name)
                    tensors = _whole(line, path)
                except _Torn as reason:
                    self.skipped.append(f"{segment.name}: {reason}")
                    continue
                name = f"{segment.name}/{path.stem}"
                try:
                    record = _record(line, tensors, name)
                except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
                    raise ValueError(f"{self.directory}: record {name} is damaged: {error}") from error
                yield record
            self.skipped += [f"{segment.name}: {name} has no line" for name in sorted(unclaimed)]


def read_metadata(directory: Path) -> dict[str, Any]:
    """What ``recording.json`` says. Raises ValueError if the folder is not a recording."""
    path = directory / METADATA_FILE
    try:
        if not path.is_file():
            raise ValueError(f"there is no file {METADATA_FILE} in it")
        if path.stat().st_size > _MAX_METADATA:
            raise ValueError(f"{METADATA_FILE} has {path.stat().st_size} bytes, expected at most {_MAX_METADATA}")
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{METADATA_FILE} does not say format {FORMAT!r}")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format version is {data.get('format_version')!r}, expected {FORMAT_VERSION}")
    except (ValueError, OSError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"{directory} is not a recording: {error}") from error
    return data


def segments(directory: Path) -> list[Path]:
    """Its segment folders, oldest first."""
    found = {int(match[1]): path for path in directory.iterdir() if (match := SEGMENT.fullmatch(path.name))}
    return [found[number] for number in sorted(found) if found[number].is_dir()]


def tensor_file(segment: Path, number: int) -> Path:
    return segment / f"{number:06d}.safetensors"


class _Torn(Exception):
    """A record that was not written to its end."""


def _lines(segment: Path) -> Iterator[bytes]:
    path = segment / LINES_FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            if len(line) == _MAX_LINE:
                raise ValueError(f"{path} has a line of more than {_MAX_LINE} bytes")
            yield line


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or type(line.get("record")) is not int:
        raise _Torn("a line is cut off")
    return line


def _whole(line: dict[str, Any], path: Path) -> bytes:
    """The tensors' file, if it is as it was when the line was written."""
    size = line.get("tensor_bytes")
    try:
        if not path.is_file() or path.stat().st_size != size or path.stat().st_size > _MAX_TENSORS:
            raise _Torn(f"{path.name} does not have the {size} bytes that its line says")
        tensors = path.read_bytes()
    except OSError as error:  # rotated away while it was read, for one
        raise _Torn(f"cannot read {path.name}: {error}") from error
    if zlib.crc32(tensors) != line.get("tensor_crc32"):
        raise _Torn(f"the checksum of {path.name} is not what its line says")
    return tensors


def _record(line: dict[str, Any], tensors: bytes, name: str) -> Record:
    if _header(tensors) > _MAX_HEADER:
        raise ValueError(f"a safetensors header of {_header(tensors)} bytes, expected at most {_MAX_HEADER}")
    arrays = load_safetensors(tensors)
    values = {key: _decode(line.get(key), arrays) for key in (*_OPTIONAL, *_REQUIRED)}
    for key, kinds in (*_OPTIONAL.items(), *_REQUIRED.items()):
        if not isinstance(values[key], kinds) and not (key in _OPTIONAL and values[key] is None):
            raise ValueError(f"its {key} is {values[key]!r:.100}")
    leftover = _decode(line.get("leftover"), arrays)
    if leftover is not None:
        leftover = Leftover(leftover["actions"], leftover["delay"])
    return Record(**values, leftover=leftover, name=name)

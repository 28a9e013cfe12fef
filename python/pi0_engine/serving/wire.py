"""openpi's wire format, read by rules of our own: msgpack in which an array is a map with the bytes keys
``__ndarray__``, ``data``, ``dtype`` and ``shape``, and a numpy scalar one with ``__npgeneric__``, ``data``, ``dtype``
(openpi ``packages/openpi-client/src/openpi_client/msgpack_numpy.py``).

What comes over a network is not trusted: sizes are limited before memory is taken for them, dtypes are a short list
without objects, and an array's bytes must be exactly what its shape and dtype say.
"""

from __future__ import annotations

import math
import reprlib
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: numpy's ``dtype.str`` -> dtype: real numbers in little-endian order.
_DTYPES = {
    dtype.str: dtype for dtype in map(np.dtype, ["?", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8",
                                                 "<f2", "<f4", "<f8"])
}  # fmt: skip
_ARRAY_KEYS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {b"__npgeneric__", b"data", b"dtype"}


@dataclass(frozen=True)
class Limits:
    """What a message may hold at most.

    An observation of a real robot has some twenty values at a depth of two; a list of plain numbers may stand where an
    array is meant. Together they bound what one message can cost: ``containers * length`` values beside its own bytes.

    Attributes:
        depth: maps and lists inside each other.
        containers: maps, lists and arrays in all.
        length: entries of one map or list.
        key: characters of a map's key; keys inside each other are joined, so long ones would multiply.
        axes: of an array.
    """

    depth: int = 8
    containers: int = 256
    length: int = 256
    key: int = 128
    axes: int = 5


def packb(tree: Any) -> bytes:
    """A tree of maps, lists, text, bytes, numbers and numpy arrays, as openpi packs it.

    Raises:
        ValueError: a type or dtype that is not of the format, or a number beyond 64 bits.
    """
    try:
        packed: bytes = _msgpack().packb(tree, default=_pack_numpy)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"cannot be sent: {error}") from error
    return packed


def unpackb(data: bytes, limits: Limits = Limits()) -> Any:
    """What ``packb`` or openpi's packer made of a tree. Arrays share the memory of ``data`` and are read-only.

    Raises:
        ValueError: bytes that are not this format, or beyond the limits; says which.
    """
    reader = _Reader(limits)
    msgpack = _msgpack()
    try:
        tree = msgpack.unpackb(
            data,
            object_pairs_hook=reader.read_map,
            list_hook=reader.read_list,
            ext_hook=_refuse_extension,
            max_array_len=limits.length,
            max_map_len=limits.length,
        )
    except msgpack.exceptions.StackError as error:
        raise ValueError(f"maps and lists are nested deeper than {limits.depth}") from error
    except msgpack.exceptions.ExtraData as error:
        raise ValueError("there are further bytes behind the message") from error
    except msgpack.exceptions.FormatError as error:
        raise ValueError("it is not msgpack") from error
    except UnicodeDecodeError as error:
        raise ValueError("a text is not UTF-8") from error
    _check(tree, limits.depth)
    return tree


class _Reader:
    """Turns msgpack's maps and lists into values, from the inside out, and counts them."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._containers = limits, 0

    def read_list(self, values: list[Any]) -> list[Any]:
        self._count()
        return values

    def read_map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count()
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a map holds a key twice")
        if b"__ndarray__" in values:
            return _array(values, self._limits.axes)
        if b"__npgeneric__" in values:
            return _scalar(values)
        for key in values:
            if not isinstance(key, str):
                raise ValueError(f"a map has the key {key[:40]!r}, expected text")
            if len(key) > self._limits.key:
                raise ValueError(f"a map has a key of {len(key)} characters, expected at most {self._limits.key}")
        return values

    def _count(self) -> None:
        self._containers += 1
        if self._containers > self._limits.containers:
            raise ValueError(f"it holds more than {self._limits.containers} maps, lists and arrays")


def _array(values: dict[Any, Any], most_axes: int) -> NDArray[Any]:
    if set(values) != _ARRAY_KEYS:
        raise ValueError(f"an array has the keys {_names(values)}, expected {_names(_ARRAY_KEYS)}")
    data, shape, dtype = values[b"data"], values[b"shape"], _dtype(values[b"dtype"])
    if not isinstance(data, bytes):
        raise ValueError(f"an array's data is {type(data).__name__}, expected bytes")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > most_axes:
        raise ValueError(f"an array's shape is {short(shape)}, expected at most {most_axes} sizes of 0 or more")
    needed = math.prod(shape) * dtype.itemsize
    if needed != len(data):
        raise ValueError(f"an array has {len(data)} bytes, expected {needed} for {dtype.str} {shape}")
    if dtype.kind == "b":  # other bytes than 0 and 1 would be neither true nor false
        return np.frombuffer(data, np.uint8).astype(np.bool_).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(values: dict[Any, Any]) -> np.generic:
    if set(values) != _SCALAR_KEYS:
        raise ValueError(f"a numpy scalar has the keys {_names(values)}, expected {_names(_SCALAR_KEYS)}")
    data, dtype = values[b"data"], _dtype(values[b"dtype"])
    if not isinstance(data, (bool, int, float)):
        raise ValueError(f"a numpy scalar's data is {type(data).__name__}, expected a number")
    try:
        if dtype.kind in "iu" and not np.iinfo(dtype).min <= data <= np.iinfo(dtype).max:  # numpy 1 would wrap it
            raise OverflowError
        number: np.generic = dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{short(data)} is not a number of {dtype.str}") from error
    return number


def _dtype(name: Any) -> np.dtype[Any]:
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"an array's dtype is {short(name)}, expected one of {sorted(_DTYPES)}")
    return dtype


def _check(value: Any, depth: int) -> None:
    """Types that msgpack knows and the format does not (its time stamps), and depth."""
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise ValueError("maps and lists are nested too deep")
        for child in value.values() if isinstance(value, dict) else value:
            _check(child, depth - 1)
    elif not isinstance(value, (str, bytes, bool, int, float, np.ndarray, np.generic, types.NoneType)):
        raise ValueError(f"it holds a {type(value).__name__}, which the format does not know")


def _pack_numpy(value: Any) -> dict[bytes, Any]:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.str not in _DTYPES:
        raise ValueError(f"an array of dtype {value.dtype.str} cannot be sent, only {sorted(_DTYPES)}")
    if isinstance(value, np.ndarray):
        # The array itself where it lies in order: msgpack copies it once.
        data = value.data if value.flags.c_contiguous and value.size else value.tobytes()
        return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} is not a type of the format")


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"it holds a msgpack extension ({code}), which the format does not know")


def _names(keys: Any) -> list[str]:
    return sorted(short(key) for key in keys)


class _Short(reprlib.Repr):
    """Looks at the beginning of a value only."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlist = 12

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[:60])


def short(value: Any) -> str:
    """For an error message: a hostile value may be long, and so may be what is in it."""
    text = _Short().repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise ValueError("msgpack is not installed: pip install 'pi0-engine[serve]'") from error
    return msgpack

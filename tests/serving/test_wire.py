"""The codec: equal to openpi-client's both ways, and hostile bytes are refused before they cost anything."""

from __future__ import annotations

import tracemalloc
from typing import Any

import hypothesis.extra.numpy as arrays
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpi_client import msgpack_numpy

from pi0_engine.serving.wire import Limits, packb, unpackb

DTYPES = [np.dtype(name) for name in ("?", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8")]
numbers = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
shapes = arrays.array_shapes(min_dims=0, min_side=0)
any_array = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, shapes))
leaves = numbers | st.text() | st.binary() | any_array
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
trees = st.dictionaries(st.text(max_size=20), values)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@settings(max_examples=200)
@given(trees)
def test_bytes_are_those_of_openpi(tree: dict[str, Any]) -> None:
    packed = packb(tree)
    assert packed == msgpack_numpy.packb(tree)
    assert same(tree, unpackb(packed, Limits(depth=64, key=10_000)))
    assert same(tree, msgpack_numpy.unpackb(packed))


def test_numpy_scalars_and_arrays_that_do_not_lie_in_order() -> None:
    frame = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)
    tree = {"frame": frame, "gripper": np.float32(0.25), "on": np.bool_(True), "flipped": np.arange(5.0)[::-1]}
    assert packb(tree) == msgpack_numpy.packb(tree)
    assert same(unpackb(packb(tree)), tree)


def test_arrays_are_views_of_the_message() -> None:
    frame = unpackb(packb({"frame": np.zeros((64, 64, 3), np.uint8)}))["frame"]
    assert not frame.flags.writeable and frame.base is not None


UNSENDABLE = [
    np.array([object()]),
    np.array(["a"]),
    np.array([1j]),
    np.zeros(1, "<f4,<i4"),
    np.zeros(1, ">f4"),
    {1},
    2**64,
]


@pytest.mark.parametrize("value", UNSENDABLE)
def test_what_cannot_be_sent_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        packb({"x": value})


def array(**changes: Any) -> bytes:
    whole = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2], **changes}
    return msgpack.packb({key.encode(): value for key, value in whole.items() if value is not ...})


def scalar(**changes: Any) -> bytes:
    whole = {"__npgeneric__": True, "data": 3, "dtype": "<i4", **changes}
    return msgpack.packb({key.encode(): value for key, value in whole.items() if value is not ...})


HOSTILE = {
    "nothing": (b"", "incomplete"),
    "cut short": (packb({"a": np.zeros(100)})[:-1], "incomplete"),
    "two messages": (b"\x01\x02", "further bytes"),
    "a reserved byte": (b"\xc1", "not msgpack"),
    "a map of 2^32 entries": (b"\xdf\xff\xff\xff\xff", "max_map_len"),
    "a list of 2^32 entries": (b"\xdd\xff\xff\xff\xff", "max_array_len"),
    "bytes of 4 GB": (b"\xc6\xff\xff\xff\xff", "incomplete"),
    "text that is not UTF-8": (b"\xa2\xff\xfe", "UTF-8"),
    "an extension": (b"\xc7\x02\x05ab", "extension"),
    "a time stamp": (msgpack.packb(msgpack.Timestamp(1, 2)), "Timestamp"),
    "depth 2000": (b"\x91" * 2000 + b"\xc0", "nested"),
    "depth 9": (msgpack.packb([[[[[[[[[1]]]]]]]]]), "nested too deep"),
    "5000 lists": (msgpack.packb([[[]] * 100] * 50), "more than 256"),
    "a key twice": (b"\x82\xa1a\x01\xa1a\x02", "a key twice"),
    "a number as key": (msgpack.packb({1: 2}), "map key"),
    "a long key": (msgpack.packb({"a" * 129: 2}), "a key of 129 characters, expected at most 128"),
    "bytes as key": (msgpack.packb({b"a": 2}), "expected text"),
    "objects": (array(dtype="|O"), "dtype is '\\|O'"),
    "structures": (array(dtype="|V4"), "dtype"),
    "text array": (array(dtype="<U2"), "dtype"),
    "complex": (array(dtype="<c8"), "dtype"),
    "big-endian": (array(dtype=">f4"), "dtype"),
    "dates": (array(dtype="<M8[s]"), "dtype"),
    "dtype in bytes": (array(dtype=b"<f4"), "dtype"),
    "dtype with code": (array(dtype="f4,O"), "dtype"),
    "less data": (array(data=bytes(7)), "7 bytes, expected 8"),
    "more data": (array(data=bytes(9)), "9 bytes, expected 8"),
    "data as text": (array(data="12345678"), "data is str"),
    "a shape that overflows": (array(shape=[2**62, 2**62, 4]), "8 bytes, expected"),
    "a negative shape": (array(shape=[-2, -1]), "shape"),
    "a shape of truths": (array(shape=[True, 2]), "shape"),
    "a shape of fractions": (array(shape=[2.0]), "shape"),
    "no list of sizes": (array(shape=2), "shape"),
    "six axes": (array(shape=[1, 1, 1, 1, 1, 2]), "at most 5"),
    "no shape": (array(shape=...), "has the keys"),
    "one key more": (array(order="F"), "has the keys"),
    "a scalar of text": (scalar(data="3"), "expected a number"),
    "a scalar that overflows": (scalar(data=2**40), "not a number of <i4"),
    "a scalar of objects": (scalar(dtype="|O"), "dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    data, why = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=why):
            unpackb(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        tree = unpackb(data)
    except ValueError:
        return
    assert same(unpackb(packb(tree)), tree)


@settings(max_examples=200)
@given(trees, st.data())
def test_a_changed_byte_is_read_or_refused(tree: dict[str, Any], data: st.DataObject) -> None:
    packed = bytearray(packb(tree))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpackb(bytes(packed))
    except ValueError as error:
        assert str(error)


def test_true_and_false_are_all_there_is_in_a_boolean_array() -> None:
    packed = array(data=bytes([0, 1, 2, 255]), dtype="|b1", shape=[4])
    assert unpackb(packed).view(np.uint8).tolist() == [0, 1, 1, 1]

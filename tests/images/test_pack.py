"""Packing frames into staging buffers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from pi0_engine.images.pack import FrameStaging, PackedSize, staging_size
from tests.support.frames import needs_extension, textured_frame


def staging(*sides: tuple[int, int], size: int = 28) -> FrameStaging:
    room = staging_size(sides, size)
    return FrameStaging(np.zeros(room.bytes, np.uint8), np.zeros(room.ints, np.int32), size)


@needs_extension
def test_frames_of_any_size_up_to_the_largest_fit() -> None:
    buffers = staging((48, 64), (48, 64))
    for sides in ([(48, 64), (48, 64)], [(1, 1), (48, 1)], [(30, 40)], []):
        frames = [textured_frame(*side) for side in sides]
        used = buffers.pack(frames)
        assert used.bytes <= buffers.pixels.size and used.ints <= buffers.table.size
        for frame, entry in zip(frames, buffers.table[: 11 * len(frames)].reshape(-1, 11), strict=True):
            begin = 16 * entry[0]
            np.testing.assert_array_equal(buffers.pixels[begin : begin + frame.size], frame.ravel())
            assert tuple(entry[1:3]) == frame.shape[:2]
    assert buffers.pack([]) == PackedSize(0, 0)


@needs_extension
def test_a_larger_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="need 9600 bytes, there is room for 9216"):
        staging((48, 64)).pack([textured_frame(50, 64)])


@needs_extension
@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), [[1, 2, 3]], None])
def test_what_is_no_frame_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"frame 1 is .*expected a numpy array, uint8"):
        staging((48, 64)).pack([textured_frame(4, 4), wrong])


@needs_extension
def test_buffers_of_another_kind_are_refused() -> None:
    pixels, table = np.zeros(8, np.uint8), np.zeros(8, np.int32)
    with pytest.raises(ValueError, match=r"pixels must be .* uint8"):
        FrameStaging(table, table)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"table must be .* int32"):
        FrameStaging(pixels, table.reshape(2, 4).astype(np.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pixels is read-only or has gaps"):
        FrameStaging(pixels[::2], table)
    table.flags.writeable = False
    with pytest.raises(ValueError, match="table is read-only or has gaps"):
        FrameStaging(pixels, table)


def test_without_the_extension_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import pi0_engine

    monkeypatch.setitem(sys.modules, "pi0_engine._C", None)
    monkeypatch.delattr(pi0_engine, "_C", raising=False)
    with pytest.raises(RuntimeError, match=r"frames cannot be packed: .*compiled at installation"):
        staging_size([(4, 4)])

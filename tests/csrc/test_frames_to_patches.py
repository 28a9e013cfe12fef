"""Packing frames and cutting them into patches, against resize_with_pad and openpi-client's recordings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.frames import RECORDED_SIZES, into_patches, needs_extension, packed, recorded, textured_frame

pytestmark = needs_extension

Frames = list[npt.NDArray[np.uint8]]


def run(frames: Frames, size: int, patch: int) -> npt.NDArray[np.float32]:
    from pi0_engine import _C

    pixels, table = packed(frames, size)
    out = np.full((len(frames), (size // patch) ** 2, patch**2 * 3), np.nan, np.float32)
    _C.frames_to_patches_host(pixels, table, out, len(frames), size, patch)
    return out


def by_resize_with_pad(frames: Frames, size: int, patch: int) -> npt.NDArray[np.float32]:
    from pi0_engine import _C

    images = np.empty((len(frames), size, size, 3), np.float32)
    _C.resize_with_pad(frames, size, size, images, 1)
    patches = into_patches(images, patch)
    cut = np.full_like(patches, np.nan)
    _C.resize_with_pad(frames, size, patch, cut, 2)
    np.testing.assert_array_equal(cut, patches)
    return patches


def assert_same(frames: Frames, size: int, patch: int) -> None:
    np.testing.assert_array_equal(run(frames, size, patch), by_resize_with_pad(frames, size, patch))


@pytest.mark.parametrize("size", RECORDED_SIZES)
def test_equals_openpi_client(size: str) -> None:
    frame, expected = recorded(size)
    np.testing.assert_array_equal(run([frame], 32, 8)[0], into_patches(expected[None], 8)[0])


@pytest.mark.parametrize(("size", "patch"), [(224, 14), (64, 16), (28, 4), (14, 1), (30, 30), (1, 1)])
@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (720, 1280), (640, 480), (224, 224), (224, 100), (223, 225), (31, 17), (1, 1), (1, 2), (1, 300)],
)
def test_equals_resize_with_pad(height: int, width: int, size: int, patch: int) -> None:
    assert_same([textured_frame(height, width)], size, patch)


@pytest.mark.parametrize(("height", "width"), [(3, 5000), (5000, 3), (1, 3000), (3000, 1), (1, 100_000), (2, 449)])
def test_extreme_aspect(height: int, width: int) -> None:
    assert_same([textured_frame(height, width)], 224, 14)


@pytest.mark.parametrize(("height", "width", "size"), [(4400, 90, 224), (400, 600, 14)])
def test_more_rows_than_a_block_keeps(height: int, width: int, size: int) -> None:
    """A patch needs about 295 and 400 source rows of 42 bytes, more than 12 KiB: each output row resamples its own."""
    assert_same([textured_frame(height, width)], size, 14)


@settings(max_examples=100)
@given(
    sides=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4),
    shape=st.sampled_from([(1, 1), (6, 2), (32, 8), (70, 14)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_resize_with_pad_on_noise(sides: list[tuple[int, int]], shape: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    assert_same([random.integers(0, 256, (*side, 3), np.uint8) for side in sides], *shape)


@pytest.mark.parametrize(
    "view",
    [
        lambda big: big[::-1, ::-1],
        lambda big: big[:, :, ::-1],
        lambda big: big[10:90:2, 5:115:3],
        lambda big: big[:, 7:60],
        lambda big: big.transpose(1, 0, 2),
        lambda big: np.ascontiguousarray(big.transpose(2, 0, 1)).transpose(1, 2, 0),
        lambda big: np.broadcast_to(big[:1, :1], (50, 60, 3)),
    ],
    ids=["rotated", "bgr", "strided", "cropped", "transposed", "channels_first", "broadcast"],
)
def test_strides_are_read_in_place(view: Any) -> None:
    frame = view(textured_frame(100, 120))
    pixels, table = packed([frame], 28)
    dense = np.ascontiguousarray(frame)
    np.testing.assert_array_equal(pixels[: dense.size], dense.ravel())
    np.testing.assert_array_equal(table, packed([dense], 28)[1])
    assert_same([frame], 28, 14)


def test_no_frames_are_no_work() -> None:
    from pi0_engine import _C

    pixels, table = np.zeros(1, np.uint8), np.zeros(1, np.int32)
    assert _C.pack_frames([], 28, pixels, table) == (0, 0)
    _C.frames_to_patches_host(pixels, table, np.zeros((0, 4, 588), np.float32), 0, 28, 14)


def test_frames_are_aligned_and_share_axes() -> None:
    from pi0_engine import _C

    frames = [textured_frame(5, 7), textured_frame(5, 7), textured_frame(9, 9)]
    pixels, table = np.zeros(1000, np.uint8), np.zeros(1000, np.int32)
    one, two = (_C.pack_frames(frames[:n], 4, pixels, table) for n in (1, 2))
    assert one[0] == 105 and two[0] == 112 + 105
    assert two[1] == one[1] + 11
    assert _C.pack_frames(frames, 4, pixels, table)[0] == 224 + 243
    np.testing.assert_array_equal(pixels[224:467], frames[2].ravel())


@settings(max_examples=200)
@given(
    most=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    shrink=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.integers(1, 256),
)
def test_no_frame_takes_more_than_is_said(most: tuple[int, int], shrink: tuple[float, float], size: int) -> None:
    """For the largest frame that is said to come, and for all smaller ones."""
    from pi0_engine import _C

    bytes_, ints = _C.packed_size(*most, size)
    for height, width in (most, [max(1, int(side * factor)) for side, factor in zip(most, shrink, strict=True)]):
        frame = np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))
        used = _C.pack_frames([frame], size, np.empty(bytes_, np.uint8), np.empty(ints, np.int32))
        assert used[0] == 3 * height * width


@pytest.mark.parametrize(("lack", "what"), [((1, 0), "bytes"), ((0, 1), "table entries")])
def test_what_does_not_fit_is_refused(lack: tuple[int, int], what: str) -> None:
    from pi0_engine import _C

    frames = [textured_frame(8, 6), textured_frame(3, 9)]
    pixels, table = packed(frames, 14)
    small = np.zeros(pixels.size - lack[0], np.uint8), np.zeros(table.size - lack[1], np.int32)
    sizes = (pixels.size, small[0].size) if lack[0] else (table.size, small[1].size)
    with pytest.raises(ValueError, match=rf"need {sizes[0]} {what}, there is room for {sizes[1]}"):
        _C.pack_frames(frames, 14, *small)
    with pytest.raises(ValueError, match="table entries"):
        _C.pack_frames(frames, 14, pixels, table[:5].copy())


def test_misuse_of_pack_frames_is_refused() -> None:
    from pi0_engine import _C

    frame, pixels, table = textured_frame(4, 4), np.zeros(64, np.uint8), np.zeros(999, np.int32)
    for wrong in (frame.astype(np.float32), frame[..., :2], frame[:0]):
        with pytest.raises(ValueError, match="pack_frames: every"):
            _C.pack_frames([wrong], 4, pixels, table)
    with pytest.raises(ValueError, match="pack_frames: size"):
        _C.pack_frames([frame], 0, pixels, table)
    with pytest.raises(TypeError):
        _C.pack_frames([frame], 4, pixels.astype(np.int8), table)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _C.pack_frames([frame], 4, pixels, table[::2])
    pixels.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _C.pack_frames([frame], 4, pixels, table)
    with pytest.raises(ValueError, match="side"):
        _C.packed_size(0, 4, 4)


@pytest.mark.parametrize("entry", range(11))
@pytest.mark.parametrize("value", [-1, 0, 1, 5, 1 << 20, 2**31 - 1, -(2**31)])
def test_a_table_that_leads_elsewhere_is_refused_or_harmless(entry: int, value: int) -> None:
    """Every number of an entry replaced: a ValueError, or a result of some kind, but no access outside the buffers."""
    from pi0_engine import _C

    pixels, table = packed([textured_frame(9, 12)], 8)
    table[entry] = value
    out = np.empty((1, 4, 48), np.float32)
    try:
        _C.frames_to_patches_host(pixels, table, out, 1, 8, 4)
    except ValueError as error:
        assert "frame 0" in str(error)


def test_misuse_of_frames_to_patches_is_refused() -> None:
    from pi0_engine import _C

    pixels, table = packed([textured_frame(9, 12)], 8)
    out = np.empty((1, 4, 48), np.float32)
    with pytest.raises(ValueError, match="does not lie inside the pixels"):
        _C.frames_to_patches_host(pixels[:-1], table, out, 1, 8, 4)
    with pytest.raises(ValueError, match="leaves the frame or the table"):
        _C.frames_to_patches_host(pixels, table[:-1], out, 1, 8, 4)
    with pytest.raises(ValueError, match="too short"):
        _C.frames_to_patches_host(pixels, table[:10], out, 1, 8, 4)
    with pytest.raises(ValueError, match="does not lie inside 4 x 4"):
        _C.frames_to_patches_host(pixels, table, out[:, :1], 1, 4, 4)
    with pytest.raises(ValueError, match="out must hold"):
        _C.frames_to_patches_host(pixels, table, out, 2, 8, 4)
    for size, patch in ((8, 3), (8, 0), (0, 4)):
        with pytest.raises(ValueError, match="multiple of patch"):
            _C.frames_to_patches_host(pixels, table, out, 1, size, patch)
        with pytest.raises(ValueError, match="multiple of patch"):
            _C.frames_to_patches_cuda(0, 0, 0, 1, size, patch, 0)


def test_cuda_errors_are_said_in_words() -> None:
    """Whatever this machine lacks: nvcc when it was built, a driver, a device; or the launch is impossible."""
    from pi0_engine import _C

    with pytest.raises(RuntimeError, match=r"^frames_to_patches_cuda: \w+( \S+){3,}"):
        _C.frames_to_patches_cuda(0, 0, 0, 1, 86 * 2, 86, 0)
    assert (_C.load_frames_to_patches_cuda() == "") == bool(_C.cuda_architectures() and torch.cuda.is_available())

"""The extension's resize_with_pad against Pillow and against frames recorded from openpi-client."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.frames import RECORDED_SIZES, needs_extension, recorded, textured_frame

pytestmark = needs_extension
LEVEL = 2 / 255  # one uint8 level in [-1, 1]


def compiled(frames: Any, out: Any, threads: int) -> None:
    from pi0_engine import _C

    size = out.shape[2]
    _C.resize_with_pad(frames, size, size, out, threads)


def resize_to_patches(frames: Any, patch: int, out: Any) -> None:
    from pi0_engine import _C

    _C.resize_with_pad(frames, 8, patch, out, 1)


def run(frames: list[npt.NDArray[np.uint8]], size: int = 224, threads: int = 2) -> npt.NDArray[np.float32]:
    out = np.full((len(frames), size, size, 3), np.nan, np.float32)
    compiled(frames, out, threads)
    return out


def by_pillow(frame: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    """The specification: scale to fit with truncated sizes, paste on black, normalise."""
    height, width = frame.shape[:2]
    ratio = max(width / size, height / size)
    new_size = (max(int(width / ratio), 1), max(int(height / ratio), 1))
    canvas = Image.new("RGB", (size, size))
    scaled = Image.fromarray(frame).resize(new_size, Image.Resampling.BILINEAR)
    canvas.paste(scaled, ((size - new_size[0]) // 2, (size - new_size[1]) // 2))
    return np.asarray(canvas).astype(np.float32) / 255 * 2 - 1


def assert_like_pillow(frame: npt.NDArray[np.uint8], size: int) -> None:
    """Equal; within one level where Pillow >= 13 resamples in the other order (see csrc/resize_with_pad.h)."""
    given, expected = run([frame], size)[0], by_pillow(frame, size)
    if frame.shape[0] <= 2 * frame.shape[1]:
        np.testing.assert_array_equal(given, expected)
    else:
        np.testing.assert_allclose(given, expected, rtol=0, atol=1.01 * LEVEL)


@pytest.mark.parametrize("size", RECORDED_SIZES)
def test_equals_openpi_client(size: str) -> None:
    frame, expected = recorded(size)
    np.testing.assert_array_equal(run([frame], size=32)[0], expected)


@pytest.mark.parametrize("size", [224, 64, 1])
@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (720, 1280), (640, 480), (224, 224), (224, 100), (256, 256), (223, 225), (31, 17), (1, 1), (1, 2)],
)
def test_equals_pillow(height: int, width: int, size: int) -> None:
    assert_like_pillow(textured_frame(height, width), size)


@pytest.mark.parametrize(("height", "width"), [(3, 5000), (5000, 3), (1, 3000), (3000, 1), (1, 100_000), (2, 449)])
def test_extreme_aspect_keeps_one_pixel(height: int, width: int) -> None:
    frame = textured_frame(height, width)
    assert_like_pillow(frame, 224)
    picture = (run([frame])[0] != -1).any(axis=-1)
    assert picture.any()
    assert min(picture.any(axis=1).sum(), picture.any(axis=0).sum()) <= 2


@settings(max_examples=100)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.sampled_from([1, 7, 32, 224]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_pillow_on_noise(height: int, width: int, size: int, seed: int) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert_like_pillow(frame, size)


@settings(max_examples=30)
@given(
    sides=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=5),
    threads=st.integers(1, 9),
)
def test_a_batch_on_threads_equals_one_by_one(sides: list[tuple[int, int]], threads: int) -> None:
    frames = [textured_frame(*side) for side in sides]
    np.testing.assert_array_equal(run(frames, 64, threads), np.concatenate([run([f], 64, 1) for f in frames]))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64, 1000])
def test_threads_change_nothing(threads: int) -> None:
    frames = [textured_frame(720, 1280), textured_frame(480, 640), textured_frame(1, 1)]
    np.testing.assert_array_equal(run(frames, 224, threads), run(frames, 224, 1))


@pytest.mark.parametrize(
    "view",
    [
        lambda big: big[::-1, ::-1],
        lambda big: big[:, :, ::-1],
        lambda big: big[10:90:2, 5:115:3],
        lambda big: big.transpose(1, 0, 2),
        lambda big: np.ascontiguousarray(big.transpose(2, 0, 1)).transpose(1, 2, 0),
        lambda big: np.broadcast_to(big[:1, :1], (50, 60, 3)),
    ],
    ids=["rotated", "bgr", "strided", "transposed", "channels_first", "broadcast"],
)
@pytest.mark.parametrize("size", [32, 120])
def test_strides_are_read_in_place(view: Any, size: int) -> None:
    frame = view(textured_frame(100, 120))
    np.testing.assert_array_equal(run([frame], size), run([np.ascontiguousarray(frame)], size))


def test_same_size_passes_through() -> None:
    frame = textured_frame(224, 224)
    np.testing.assert_array_equal(run([frame])[0], frame.astype(np.float32) / 255 * 2 - 1)


def test_landscape_is_centred_on_black() -> None:
    out = run([np.full((100, 200, 3), 255, np.uint8)], size=50)[0]
    assert (out[:12] == -1).all() and (out[37:] == -1).all()
    assert (out[12:37] == 1).all()


def test_other_python_threads_run_meanwhile() -> None:
    """The interpreter lock is released: were it held, the other thread could not count during the call."""
    frame = np.broadcast_to(np.zeros(3, np.uint8), (4000, 4000, 3))
    counted, started, done = 0, threading.Event(), threading.Event()

    def count() -> None:
        nonlocal counted
        started.set()
        while not done.wait(0.001):
            counted += 1

    other = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)  # the lock is never taken from its holder, only given
    try:
        other.start()
        started.wait()
        before = counted
        run([frame], 224, 1)
        after = counted
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    assert after > before


@pytest.mark.parametrize(
    ("frames", "shape", "message"),
    [
        ([np.zeros((4, 4, 3), np.float32)], (1, 8, 8, 3), "uint8"),
        ([np.zeros((4, 4), np.uint8)], (1, 8, 8, 3), "uint8"),
        ([np.zeros((4, 4, 4), np.uint8)], (1, 8, 8, 3), "uint8"),
        ([np.zeros((0, 4, 3), np.uint8)], (1, 8, 8, 3), "side"),
        ([np.zeros((4, 4, 3), np.uint8)], (2, 8, 8, 3), "out must have"),
        ([np.zeros((4, 4, 3), np.uint8)], (1, 8, 9, 3), "out must have"),
        ([np.zeros((4, 4, 3), np.uint8)], (1, 0, 0, 3), "size must be"),
        ([np.broadcast_to(np.zeros(3, np.uint8), (2**20 + 1, 1, 3))], (1, 8, 8, 3), "side"),
    ],
)
def test_misuse_is_refused(frames: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled(frames, np.zeros(shape, np.float32), 1)


def test_misused_out_and_threads_are_refused() -> None:
    frame = np.zeros((4, 4, 3), np.uint8)
    out = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="threads"):
        compiled([frame], out, 0)
    with pytest.raises(TypeError):
        compiled([frame], out.astype(np.float64), 1)
    with pytest.raises(TypeError):
        compiled([frame], np.zeros((1, 8, 8, 6), np.float32)[..., ::2], 1)
    for patch in (0, 3, 16):
        with pytest.raises(ValueError, match="patch divide it"):
            resize_to_patches([frame], patch, out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        compiled([frame], out, 1)

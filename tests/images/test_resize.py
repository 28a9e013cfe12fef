"""FramePreprocessor: which implementation runs and why, and its errors. Pixels: tests/csrc/test_resize_with_pad.py."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import pytest

from pi0_engine.images.resize import FramePreprocessor, resize_with_pad
from tests.support.frames import RECORDED_SIZES, into_patches, needs_extension, recorded

IMPLEMENTATIONS = [pytest.param("cpp", marks=needs_extension), "pillow"]


def noise(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    import pi0_engine

    monkeypatch.delattr(pi0_engine, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "pi0_engine._C", None)  # makes the import fail


@needs_extension
def test_auto_takes_the_extension() -> None:
    preprocess = FramePreprocessor()
    assert preprocess.implementation == "cpp"
    assert preprocess.reason == "the extension pi0_engine._C is installed"


@pytest.mark.usefixtures("without_extension")
def test_auto_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pi0_engine"):
        preprocess = FramePreprocessor()
    assert preprocess.implementation == "pillow"
    assert "pi0_engine._C cannot be imported" in preprocess.reason
    assert preprocess.reason in caplog.text
    assert preprocess([noise(20, 30)]).shape == (1, 224, 224, 3)


@pytest.mark.usefixtures("without_extension")
def test_cpp_by_name_is_refused_where_absent() -> None:
    with pytest.raises(RuntimeError, match=r"'cpp' is unavailable.*pi0_engine\._C"):
        FramePreprocessor("cpp")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_named_implementations(implementation: Any) -> None:
    preprocess = FramePreprocessor(implementation)
    assert (preprocess.implementation, preprocess.reason) == (implementation, "asked for by name")


@needs_extension
def test_implementations_agree() -> None:
    frames = [noise(48, 64), noise(64, 64), noise(65, 33), noise(1, 200)]
    given = [FramePreprocessor("cpp", size=64)(frames), FramePreprocessor("pillow", size=64)(frames)]
    np.testing.assert_array_equal(*given)
    assert given[0].dtype == np.float32


@pytest.mark.parametrize("size", RECORDED_SIZES)
def test_pillow_equals_openpi_client(size: str) -> None:
    frame, expected = recorded(size)
    np.testing.assert_array_equal(FramePreprocessor("pillow", size=32)([frame])[0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_writes_into_out(implementation: Any) -> None:
    preprocess = FramePreprocessor(implementation, size=16)
    frames = np.stack([noise(20, 30), noise(20, 30)])
    out = np.full((2, 16, 16, 3), np.nan, np.float32)
    assert preprocess(list(frames), out) is out
    np.testing.assert_array_equal(out, preprocess(frames))  # a stack of frames is a sequence of frames


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flipped_and_read_only_frames(implementation: Any) -> None:
    preprocess = FramePreprocessor(implementation, size=16)
    flipped = noise(20, 30)[::-1, ::-1]
    flipped.flags.writeable = False
    np.testing.assert_array_equal(preprocess([flipped]), preprocess([flipped.copy()]))


def test_one_frame() -> None:
    frame = noise(48, 64)
    np.testing.assert_array_equal(resize_with_pad(frame), FramePreprocessor("pillow")([frame])[0])
    assert resize_with_pad(frame, size=32).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("frame", "given"),
    [
        (noise(4, 5).astype(np.float32), r"float32 \[4, 5, 3\]"),
        (noise(4, 5)[..., 0], r"uint8 \[4, 5\]"),
        (noise(4, 5).transpose(2, 0, 1), r"uint8 \[3, 4, 5\]"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 \[4, 5, 4\]"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
        ([[1, 2, 3]], "list"),
        (None, "NoneType"),
    ],
)
def test_wrong_frames_are_named(frame: Any, given: str) -> None:
    with pytest.raises(ValueError, match=f"frame is {given}, expected "):
        resize_with_pad(frame)
    with pytest.raises(ValueError, match=f"frame 1 is {given}, expected "):
        FramePreprocessor()([noise(4, 5), frame])


def test_one_frame_given_as_the_sequence() -> None:
    with pytest.raises(ValueError, match=r"frame 0 is uint8 \[5, 3\], expected a numpy array, uint8 \[height, width"):
        FramePreprocessor()(noise(4, 5))  # type: ignore[arg-type]


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="frames is empty"):
        FramePreprocessor()([])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float64), r"out is float64 \[1, 8, 8, 3\], expected float32 \[1, 16, 16, 3\]"),
        (np.zeros((1, 8, 8, 3), np.float32), r"out is float32 \[1, 8, 8, 3\]"),
        ("pixels", "out is str"),
        (np.zeros((1, 16, 16, 6), np.float32)[..., ::2], "not C-contiguous"),
        (np.broadcast_to(np.float32(0), (1, 16, 16, 3)), "read-only"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_out_is_named(implementation: Any, out: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FramePreprocessor(implementation, size=16)([noise(4, 5)], out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("patch", [1, 4, 16])
def test_patches_are_the_pictures_squares(implementation: Any, patch: int) -> None:
    preprocess, frames = FramePreprocessor(implementation, size=16), [noise(20, 30), noise(16, 16), noise(30, 20)]
    out = np.full((3, (16 // patch) ** 2, 3 * patch**2), np.nan, np.float32)
    preprocess.patches(frames, patch, out)
    np.testing.assert_array_equal(out, into_patches(preprocess(frames), patch))


def test_patches_that_do_not_fit_are_refused() -> None:
    preprocess, out = FramePreprocessor(size=16), np.zeros((1, 16, 48), np.float32)
    with pytest.raises(ValueError, match="patch is 5, expected a divisor of 16"):
        preprocess.patches([noise(4, 5)], 5, out)
    with pytest.raises(ValueError, match=r"out is float32 \[1, 16, 48\], expected float32 \[1, 4, 192\]"):
        preprocess.patches([noise(4, 5)], 8, out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementation": "opencv"}, "implementation is 'opencv', expected 'auto', 'cpp' or 'pillow'"),
        ({"size": 0}, "size is 0, expected"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FramePreprocessor(**arguments)

"""Recordings: what goes in comes out, whatever happened to the disk or the process in between."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import save

from pi0_engine.recording import store
from pi0_engine.recording.files import Record, Recording, encode_record, pack_record
from pi0_engine.recording.recorder import Recorder
from pi0_engine.robots.files import declaration, get_robot, parse_robot, robot_names
from pi0_engine.rtc.schedule import Leftover

METADATA = {"robot": {"name": "toy"}, "engine": {"dtype": "float32"}}
RNG = np.random.default_rng(0)


def frame(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


OBSERVATIONS: dict[str, dict[str, Any]] = {
    "aloha": {
        "state": RNG.standard_normal(14),
        "images": {"cam_high": frame(3, 24, 32), "cam_left_wrist": frame(3, 24, 32)},
        "prompt": "fold the towel",
    },
    "droid": {
        "observation/exterior_image_1_left": frame(18, 32, 3),
        "observation/wrist_image_left": frame(18, 32, 3).astype(np.float32) / 255,
        "observation/joint_position": RNG.standard_normal(7).astype(np.float32),
        "observation/gripper_position": np.float32(0.5),
        "prompt": b"put the cup away",
    },
    "libero": {
        "observation/image": frame(32, 32, 3)[::-1, ::-1],  # turned by the client: not contiguous
        "observation/wrist_image": frame(32, 32, 3),
        "observation/state": np.zeros(8),
        "prompt": np.array("pick up the bowl"),
    },
}


def record(number: int = 0, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "observation": {"q": np.arange(3.0) + number},
        "reply": {"actions": np.full((4, 3), number, np.float32), "policy_timing": {"infer_ms": 1.5}},
        "noise": np.zeros((4, 8), np.float32),
    }
    return Record(**{**values, **changes})


def write(directory: Path, *records: Record, **options: Any) -> Recorder:
    with Recorder(directory, METADATA, **options) as recorder:
        for item in records:
            recorder.write(item)
            recorder.flush()
    return recorder


def numbers(directory: Path) -> list[int]:
    """Which of ``record(number)`` are there, in order."""
    return [int(item.reply["actions"][0, 0]) for item in Recording(directory)]


def assert_same(actual: Any, expected: Any) -> None:
    """Values, types, dtypes and bits. Text and bytes in an array come back as themselves."""
    if isinstance(expected, np.ndarray) and expected.dtype.kind in "US":
        expected = expected.item()
    if isinstance(expected, (np.ndarray, np.generic)):
        assert isinstance(actual, np.ndarray) and actual.shape == expected.shape
        assert actual.dtype == expected.dtype.newbyteorder("=")
        assert actual.tobytes() == expected.astype(actual.dtype).tobytes()
    elif isinstance(expected, Mapping):
        assert isinstance(actual, dict) and list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert isinstance(actual, list) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(actual) is type(expected) and (actual == expected or expected != expected)


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robot", OBSERVATIONS)
def test_an_inference_comes_back_to_the_bit(robot: str, tmp_path: Path) -> None:
    leftover = Leftover(RNG.standard_normal((7, 8)).astype(np.float32), 3)
    reply = {"actions": RNG.standard_normal((10, 8)).astype(np.float32), "guards": {"applied": "clip", "count": 2}}
    given = Record(
        observation=OBSERVATIONS[robot],
        reply=reply,
        noise=RNG.standard_normal((10, 32)).astype(np.float32),
        prompt="another",
        num_steps=5,
        leftover=leftover,
        control={"request": 7, "rtc": {"executed": 3, "delay": 2}},
        latency_ms=41.5,
        time=1.75e9,
    )
    assert write(tmp_path, given, record(seed=5, noise=None)).dropped == 0
    read, seeded = Recording(tmp_path)
    assert_same(read.observation, given.observation)
    for name in ("reply", "noise", "control", "prompt", "num_steps", "num_samples", "latency_ms", "time", "seed"):
        assert_same(getattr(read, name), getattr(given, name))
    assert read.leftover is not None and read.leftover.delay == 3
    assert_same(read.leftover.actions, leftover.actions)
    assert (read.name, seeded.name) == ("segment-000001/000001", "segment-000001/000002")
    assert (seeded.seed, seeded.noise, seeded.leftover) == (5, None, None)


def test_the_files_are_what_others_can_read(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write(tmp_path, record(3))
    segment = tmp_path / "segment-000001"
    tensors = load_file(segment / "000001.safetensors")
    assert set(tensors) == {"observation/q", "reply/actions", "noise"}
    line = json.loads((segment / "records.jsonl").read_text())
    assert line["reply"] == {
        "map": {"actions": {"array": "reply/actions"}, "policy_timing": {"map": {"infer_ms": 1.5}}}
    }
    assert json.loads((tmp_path / "recording.json").read_text())["robot"] == {"name": "toy"}


ARRAYS = hnp.arrays(
    st.sampled_from(["bool", "u1", "<i2", ">i4", "<u8", "<f2", ">f4", "<f8"]), hnp.array_shapes(min_dims=0, min_side=0)
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | ARRAYS
TREES = st.dictionaries(
    st.text(max_size=6),
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner)),
    max_size=4,
)


@given(TREES)
def test_any_observation_comes_back(tree: dict[str, Any]) -> None:
    """Also keys that look like the format's own tags, and keys with slashes that meet nested ones."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorder = write(Path(folder), record(observation=tree))
        assert (recorder.written, recorder.dropped) == (1, 0)
        (read,) = Recording(folder)
        assert_same(read.observation, tree)


def test_keys_that_meet_or_look_like_tags() -> None:
    tree = {"a/b": np.zeros(1), "a": {"b": np.ones(2), "array": "noise"}, "map": {}, "float": {"float": "nan"}}
    line, arrays = encode_record(record(observation=tree))
    assert len(arrays) == 4
    assert line["observation"]["map"]["a"]["map"]["b"] == {"array": "observation/a/b~"}


def test_the_arrays_are_copied(tmp_path: Path) -> None:
    """A camera driver writes its next frame into the same memory."""
    observation = {"q": np.zeros(3)}
    with Recorder(tmp_path, METADATA) as recorder:
        recorder.write(record(observation=observation))
        observation["q"][:] = 9
    (read,) = Recording(tmp_path)
    np.testing.assert_array_equal(read.observation["q"], np.zeros(3))


@pytest.mark.parametrize("name", robot_names())
def test_a_robot_comes_back(name: str) -> None:
    robot = get_robot(name)
    assert parse_robot(json.loads(json.dumps(declaration(robot))), "recording.json") == robot


def test_a_robot_with_everything_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: aloha\nprompt: fold\nprompt_key: task\naction_horizon: 20\ndiscrete_state_input: false\n"
        "control_hz: 50\nguards: {on_violation: hold, limits: [-3, 3], max_velocity: 2, max_jump: 1.5}\n"
    )
    robot = get_robot(file)
    assert parse_robot(json.loads(json.dumps(declaration(robot))), "recording.json") == robot
    with pytest.raises(ValueError, match=r"unknown keys \['wheels'\]"):
        parse_robot({**declaration(robot), "wheels": 4}, "recording.json")


# --- what is not recorded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"noise": None}, {"seed": 3}])
def test_a_record_that_could_not_be_repeated_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the noise or the seed"):
        record(**changes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "observation/x is object"),
        (np.array([None]), "array of object"),
        (np.zeros(2, complex), "complex128"),
        ({1: 2}, r"observation/x has keys \[1\]"),
        (np.array(["a", "b"]), "<U1"),
    ],
)
def test_a_value_that_cannot_be_kept_drops_its_record_only(
    value: Any, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = write(tmp_path, record(1), record(2, observation={"x": value}), record(3))
    assert numbers(tmp_path) == [1, 3] and (recorder.written, recorder.dropped) == (2, 1)
    import re

    assert re.search(message, caplog.text)


def test_a_deep_observation_is_dropped_not_followed(tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"x": deep}
    assert write(tmp_path, record(observation=deep)).dropped == 1


def test_a_disk_that_does_not_keep_up_drops_and_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, busy = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> tuple[bytes, bytes]:
        busy.set()
        assert gate.wait(60)
        return pack_record(*arguments)

    monkeypatch.setattr(store, "pack_record", slow)
    with Recorder(tmp_path, METADATA, queue_size=2) as recorder:
        assert recorder.write(record(0)) and busy.wait(60)
        taken = [recorder.write(record(number)) for number in range(1, 14)]
        assert taken == [True] * 2 + [False] * 11 and recorder.dropped == 11
        gate.set()
    assert numbers(tmp_path) == [0, 1, 2] and recorder.written == 3
    told = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    assert told == [f"{n} records dropped, the last one because: the disk does not keep up" for n in (1, 10)]
    assert not recorder.write(record()) and recorder.dropped == 12  # closed
    recorder.close()  # a second time is nothing


def test_what_is_written_makes_room_in_memory(tmp_path: Path) -> None:
    """Also what could not be written: many times the bound goes through, as long as the disk keeps up."""
    one = sum(array.nbytes for array in encode_record(record())[1].values())
    with Recorder(tmp_path, METADATA, queue_bytes=2 * one, max_bytes=3 * one) as recorder:
        for number in range(20):
            assert recorder.write(record(number)), f"record {number} was dropped: the memory of others is still counted"
            recorder.flush()
    assert recorder.written + recorder.dropped == 20


def test_a_stuck_disk_holds_neither_memory_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, busy = threading.Event(), threading.Event()

    def stuck(*arguments: Any) -> tuple[bytes, bytes]:
        busy.set()
        assert gate.wait(60)
        return pack_record(*arguments)

    monkeypatch.setattr(store, "pack_record", stuck)
    one = sum(array.nbytes for array in encode_record(record())[1].values())
    recorder = Recorder(tmp_path, METADATA, queue_bytes=3 * one)
    assert recorder.write(record(0)) and busy.wait(60)
    assert [recorder.write(record(number)) for number in range(1, 5)] == [True, True, False, False]
    recorder.close(timeout_s=0.2)
    assert "does not take the last records" in caplog.text
    gate.set()
    recorder.flush()
    assert numbers(tmp_path) == [0, 1, 2]


def test_a_full_disk_does_not_stop_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_bytes
    failing = {2, 3, 6}
    count = iter(range(1, 100))

    def full(path: Path, data: bytes) -> int:
        if next(count) in failing:
            written(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    recorder = write(tmp_path, *map(record, range(1, 8)))
    assert numbers(tmp_path) == [1, 4, 5, 7] and (recorder.written, recorder.dropped) == (4, 3)
    reader = Recording(tmp_path)
    assert len(list(reader)) == 4 and reader.skipped == []
    assert all((segment / "records.jsonl").exists() for segment in tmp_path.glob("segment-*"))  # no empty ones


# --- how much is kept ----------------------------------------------------------------------------------------------


def size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("segment-*/*"))


def test_the_oldest_are_forgotten_and_the_folder_stays_within_its_bound(tmp_path: Path) -> None:
    item = record(observation={"image": frame(20, 20, 3)})
    one = sum(map(len, pack_record(1, *encode_record(item))))
    limit = 20 * one
    with Recorder(tmp_path, METADATA, max_bytes=limit) as recorder:
        for number in range(60):
            recorder.write(record(number, observation={"image": frame(20, 20, 3)}))
            recorder.flush()
            assert size_on_disk(tmp_path) <= limit
    kept = numbers(tmp_path)
    assert kept == list(range(kept[0], 60)) and 16 <= len(kept) <= 20
    assert (recorder.written, recorder.dropped) == (60, 0)


def test_a_record_beyond_the_bound_is_dropped(tmp_path: Path) -> None:
    large = record(1, observation={"image": frame(100, 100, 3)})
    recorder = write(tmp_path, record(0), large, record(2), max_bytes=20_000)
    assert numbers(tmp_path) == [0, 2] and recorder.dropped == 1


def test_a_recording_is_continued_and_its_bound_holds_for_the_old_part_too(tmp_path: Path) -> None:
    write(tmp_path, record(0), record(1))
    write(tmp_path, record(2))
    assert numbers(tmp_path) == [0, 1, 2] and len(list(tmp_path.glob("segment-*"))) == 2
    one = size_on_disk(tmp_path) // 3
    write(tmp_path, record(3), max_bytes=int(2.5 * one))
    assert numbers(tmp_path) == [2, 3]


def test_files_of_others_in_a_segment_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, record(0))
    (tmp_path / "segment-000001" / "notes.txt").write_text("keep me")
    one = size_on_disk(tmp_path)
    write(tmp_path, record(1), record(2), max_bytes=2 * one)
    assert numbers(tmp_path) == [1, 2] and (tmp_path / "segment-000001" / "notes.txt").read_text() == "keep me"


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_is_not_recorded_into(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="not empty and not a recording"):
        Recorder(tmp_path, METADATA)
    write(tmp_path / "a" / "new", record())
    with pytest.raises(ValueError, match=r"recording of something else: \['engine'\] differ"):
        Recorder(tmp_path / "a" / "new", {**METADATA, "engine": {"dtype": "bfloat16"}})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot record into"):
        Recorder(tmp_path / "file", METADATA)
    for name in ("max_bytes", "queue_size", "queue_bytes"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            Recorder(tmp_path / "new", METADATA, **{name: 0})


def test_one_process_records_at_a_time(tmp_path: Path) -> None:
    with Recorder(tmp_path, METADATA), pytest.raises(ValueError, match="another process records into"):
        Recorder(tmp_path, METADATA)
    Recorder(tmp_path, METADATA).close()


# --- crashes -------------------------------------------------------------------------------------------------------

KILLED = """
import sys
import numpy as np
from pi0_engine.recording.recorder import Recorder
from pi0_engine.recording.files import Record
recorder = Recorder(sys.argv[1], {})
image, told = np.zeros((224, 224, 3), np.uint8), False
for number in range(2000):
    recorder.write(Record({"image": image}, {"actions": np.full((50, 14), number, np.float32)}, seed=0))
    if number == 5:
        recorder.flush()
        print("writing", flush=True)
"""


def test_everything_before_a_kill_is_readable(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        finally:
            process.kill()  # SIGKILL: nothing is closed, nothing flushed
    recording = Recording(tmp_path)
    kept = [int(item.reply["actions"][0, 0]) for item in recording]
    assert kept[:6] == list(range(6)) and kept == sorted(set(kept)) and len(recording.skipped) <= 1


def lines_of(directory: Path) -> Path:
    return directory / "segment-000001" / "records.jsonl"


def test_a_line_cut_off_at_any_byte_is_skipped_and_named(tmp_path: Path) -> None:
    write(tmp_path, record(0), record(1))
    whole = lines_of(tmp_path).read_bytes()
    first = whole.index(b"\n") + 1
    for length in (first + 1, first + 20, len(whole) - 1):
        lines_of(tmp_path).write_bytes(whole[:length])
        recording = Recording(tmp_path)
        assert len(list(recording)) == 1
        assert recording.skipped == [
            "segment-000001: a line is cut off",
            "segment-000001: 000002.safetensors has no line",
        ]
    lines_of(tmp_path).write_bytes(whole[:first])
    recording = Recording(tmp_path)
    assert len(list(recording)) == 1 and recording.skipped == ["segment-000001: 000002.safetensors has no line"]


@pytest.mark.parametrize("damage", ["cut", "zeros", "bit", "gone"])
def test_torn_arrays_are_skipped_and_named(damage: str, tmp_path: Path) -> None:
    """What a power cut leaves: a file shorter than it was, or with blocks that never reached the disk."""
    write(tmp_path, record(0), record(1), record(2))
    path = tmp_path / "segment-000001" / "000002.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": data[:-5], "zeros": data[:-8] + bytes(8), "bit": data[:50] + b"\x01" + data[51:]}[damage]
        )
    if damage == "zeros":
        path.write_bytes(bytes(len(data)))
    recording = Recording(tmp_path)
    assert [int(item.reply["actions"][0, 0]) for item in recording] == [0, 2]
    assert len(recording.skipped) == 1 and "000002.safetensors" in recording.skipped[0]


# --- folders that somebody made ------------------------------------------------------------------------------------


def forge(directory: Path, tensors: bytes, **changes: Any) -> None:
    """A record whose size and checksum are right."""
    write(directory, record())
    line = json.loads(lines_of(directory).read_bytes())
    line.update({"tensor_bytes": len(tensors), "tensor_crc32": zlib.crc32(tensors), **changes})
    lines_of(directory).write_text(json.dumps(line) + "\n")
    (directory / "segment-000001" / "000001.safetensors").write_bytes(tensors)


GOOD = save({"noise": np.zeros((4, 8), np.float32), "reply/actions": np.zeros((4, 3), np.float32)})
EMPTY: dict[str, Any] = {"map": {}}


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (struct.pack("<Q", 1 << 62) + b"{}", {}, "safetensors header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 900_000) + b"{}", {}, "is damaged"),
        (b"", {}, "is damaged"),
        (b"\x80\x04N.", {}, "is damaged"),  # a pickle
        (GOOD, {"observation": {"array": "absent"}}, "no value of a recording"),
        (GOOD, {"observation": {"pickle": "x"}}, "no value of a recording"),
        (GOOD, {"observation": {"map": {}, "array": "noise"}}, "no value of a recording"),
        (GOOD, {"observation": []}, r"its observation is \[\]"),
        (GOOD, {"observation": EMPTY, "seed": "x", "noise": None}, "its seed is 'x'"),
        (GOOD, {"observation": EMPTY, "noise": 3}, "its noise is 3"),
        (GOOD, {"observation": EMPTY, "noise": None}, "the noise or the seed"),
        (GOOD, {"observation": EMPTY, "num_samples": None}, "its num_samples is None"),
        (GOOD, {"observation": EMPTY, "leftover": EMPTY}, "is damaged: 'actions'"),
        (
            GOOD,
            {"observation": EMPTY, "leftover": {"map": {"actions": {"array": "noise"}, "delay": -1}}},
            "delay is -1",
        ),
        (GOOD, {"observation": {"map": {"x": {"bytes": "?"}}}}, "is damaged"),
    ],
)
def test_a_forged_record_is_a_value_error(
    tensors: bytes, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    forge(tmp_path, tensors, **changes)
    with pytest.raises(ValueError, match=message) as error:
        list(Recording(tmp_path))
    assert "segment-000001/000001" in str(error.value)


def test_a_record_number_leads_nowhere_else(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(GOOD)
    for number in ("../../secret", -1, 10**30, True, None):
        directory = tmp_path / f"recording{number!s:.3}".replace(".", "_").replace("/", "_")
        forge(directory, GOOD, record=number, observation=EMPTY)
        recording = Recording(directory)
        assert list(recording) == [] and recording.skipped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a recording"),
        (b"[]", "does not say format"),
        (b'{"format": "rosbag"}', "does not say format"),
        (b'{"format": "pi0-engine recording", "format_version": 2}', "format version is 2, expected 1"),
        (b"\xff\xfe", "is not a recording"),
        (b"[" * 100_000, "is not a recording"),
        (b" " * (1 << 20) + b"{}", "1048578 bytes"),
    ],
)
def test_a_folder_that_is_no_recording(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "recording.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Recording(tmp_path)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"is not a recording: there is no file recording\.json"):
            Recording(path)


def test_an_endless_line_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, record())
    with lines_of(tmp_path).open("ab") as file:
        file.truncate(20 << 20)  # zeros, sparse on disk
    with pytest.raises(ValueError, match="a line of more than"):
        list(Recording(tmp_path))


def test_too_much_for_a_reader_is_not_written(tmp_path: Path) -> None:
    recorder = write(tmp_path, record(observation={"text": "x" * (16 << 20)}), record(1))
    assert numbers(tmp_path) == [1] and recorder.dropped == 1

"""Recording what a policy is asked and what it answers, without ever holding it up (docs/recording.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.benchmark import describe_machine
from pi0_engine.engine.runtime import Engine
from pi0_engine.policy import Pi0Policy
from pi0_engine.recording_files import (
    FORMAT,
    FORMAT_VERSION,
    LINES_FILE,
    METADATA_FILE,
    Record,
    encode_record,
    pack_record,
    read_metadata,
    segments,
    tensor_file,
)
from pi0_engine.robot_files import declaration

log = logging.getLogger(__name__)

#: A recording has at least this many segments when it is full, so that rotation forgets an eighth of it at a time.
_SEGMENTS = 8


class Recorder:
    """Writes records into a folder, in a thread of its own. Safe to use from several threads.

    The folder never holds more than ``max_bytes``: the oldest segment is deleted for the newest record. Nothing that
    goes wrong here reaches the caller: a record that cannot be kept is dropped, counted and logged.

    Args:
        directory: new or empty, or a recording with the same metadata, which is continued.
        metadata: what :func:`describe_policy` says, or any map of JSON values.
        max_bytes: of all records together.
        queue_size: records that may wait for the disk; one more is dropped.

    Raises:
        ValueError: a folder that holds something else, or into which another process records.
    """

    def __init__(
        self,
        directory: str | Path,
        metadata: Mapping[str, Any],
        *,
        max_bytes: int = 10_000_000_000,
        queue_size: int = 16,
    ) -> None:
        if max_bytes < 1 or queue_size < 1:
            raise ValueError(f"max_bytes is {max_bytes} and queue_size {queue_size}, expected at least 1 of each")
        self._store = _Store(Path(directory), metadata, max_bytes)
        self._queue: queue.Queue[Any] = queue.Queue(queue_size)
        self._lock = threading.RLock()
        self._closed = False
        self.written = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> bool:
        """Take a record; False if it was dropped. Copies its arrays, and leaves the rest to the thread."""
        if self._queue.full():  # before anything is copied
            return self._drop("the disk does not keep up")
        try:
            item = encode_record(record)
        except ValueError as error:
            return self._drop(str(error))
        with self._lock:
            if self._closed:
                return self._drop("the recorder is closed")
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                return self._drop("the disk does not keep up")
        return True

    def flush(self) -> None:
        """Wait until everything taken so far is on disk or dropped."""
        self._queue.join()

    def close(self) -> None:
        """Write what is waiting, then end. Further records are dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._store.close()
        log.info("recorded %d inferences into %s, dropped %d", self.written, self._store.directory, self.dropped)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._store.append(*item)
                self.written += 1
            except Exception as error:  # whatever it is: serving goes on
                self._drop(f"{type(error).__name__}: {error}")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _drop(self, reason: str) -> bool:
        with self._lock:
            self.dropped += 1
            count = self.dropped
        if count == 10 ** (len(str(count)) - 1):  # the 1st, the 10th, the 100th, ...
            log.warning("%d records dropped, the last one because: %s", count, reason)
        return False


class RecordingPolicy:
    """A policy in this process whose every answer is recorded, with the noise that it started from.

    Args:
        policy: answers.
        recorder: keeps.
        seed: of the noise that starts each chunk; None draws one from the operating system. The same seed gives the
            same chunks as a ``Pi0Policy`` of that seed.
    """

    def __init__(self, policy: Pi0Policy, recorder: Recorder, *, seed: int | None = None) -> None:
        self.policy, self.recorder = policy, recorder
        self._rng = np.random.default_rng(seed)

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        noise: ArrayLike | None = None,
        seed: int | None = None,
        num_samples: int = 1,
        num_steps: int | None = None,
        **further: Any,
    ) -> dict[str, Any]:
        """As :meth:`Pi0Policy.infer`, for one observation. A call that raises is not recorded."""
        if not isinstance(observation, Mapping):
            raise ValueError(f"the observation is {type(observation).__name__}: a recording holds them one by one")
        started = time.perf_counter()
        if prompt is None and self.policy.subtask is not None:
            prompt = self.policy.subtask.instruction(observation)
        if noise is None:
            rng = self._rng if seed is None else np.random.default_rng(seed)
            config = self.policy.config
            noise = rng.standard_normal((num_samples, config.action_horizon, config.action_dim), dtype=np.float32)
        elif seed is not None:
            raise ValueError("both noise and seed are given, expected at most one")
        start: NDArray[np.float32] = np.array(noise, dtype=np.float32)
        reply = self.policy.infer(
            observation, prompt=prompt, noise=start, num_samples=num_samples, num_steps=num_steps, **further
        )
        self.recorder.write(
            Record(
                observation=observation,
                reply=reply,
                noise=start,
                prompt=prompt,
                num_samples=num_samples,
                num_steps=num_steps,
                leftover=further.get("leftover"),
                latency_ms=1e3 * (time.perf_counter() - started),
                time=time.time(),
            )
        )
        return reply


def describe_policy(policy: Pi0Policy, **sources: Any) -> dict[str, Any]:
    """What a replay needs to know about a policy, as JSON values.

    Args:
        sources: where it came from, as far as known: ``checkpoint``, ``revision``, ``base`` or ``random_weights``
            (the seed), ``tokenizer``, ``norm_stats``, ``asset_id``, ``seed``. None counts as not given.
    """
    return {
        "version": importlib.metadata.version("pi0-engine"),
        **({"rtc": dataclasses.asdict(policy.rtc)} if hasattr(policy, "rtc") else {}),
        "robot": declaration(policy.transform.robot),
        "model": policy.config.to_dict(),
        "sources": {name: value for name, value in sources.items() if value is not None},
        "engine": describe_engine(policy.engine),
    }


def describe_engine(engine: Engine) -> dict[str, Any]:
    """What decides how an engine rounds."""
    machine = describe_machine(engine.device)
    return {
        "device": engine.device.type,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "backend": engine.engine_config.backend,
        "machine": {name: machine[name] for name in ("device", "threads", "torch")},
    }


class _Store:
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

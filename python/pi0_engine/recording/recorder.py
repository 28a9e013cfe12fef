"""Recording what a policy is asked and what it answers, without ever holding it up (docs/recording.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0_engine.policy import Pi0Policy
from pi0_engine.recording.files import Record, encode_record
from pi0_engine.recording.store import SegmentStore
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import declaration
from pi0_engine.rtc.schedule import Leftover

log = logging.getLogger(__name__)


class Recorder:
    """Writes records into a folder, in a thread of its own. Safe to use from several threads.

    The folder never holds more than ``max_bytes``: the oldest segment is deleted for the newest record. Nothing that
    goes wrong here reaches the caller: a record that cannot be kept is dropped, counted and logged.

    Args:
        directory: new or empty, or a recording with the same metadata, which is continued.
        metadata: what :func:`describe_policy` says, or any map of JSON values.
        max_bytes: of all records together.
        queue_size, queue_bytes: records that may wait for the disk; one more is dropped.

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
        queue_bytes: int = 256_000_000,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("queue_size", queue_size), ("queue_bytes", queue_bytes)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._store = SegmentStore(Path(directory), metadata, max_bytes)
        self._queue: queue.Queue[Any] = queue.Queue(queue_size)
        self._queue_bytes, self._waiting = queue_bytes, 0
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
        except Exception as error:  # a caller's map may change while it is read, for one
            return self._drop(f"{type(error).__name__}: {error}")
        with self._lock:
            if self._closed:
                return self._drop("the recorder is closed")
            if self._queue.full() or self._waiting + _nbytes(item) > self._queue_bytes:
                return self._drop("the disk does not keep up")
            self._waiting += _nbytes(item)
            self._queue.put_nowait(item)  # only ever filled under the lock
        return True

    def flush(self) -> None:
        """Wait until everything taken so far is on disk or dropped."""
        self._queue.join()

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is waiting, then end. Further records are dropped, and so is what a stuck disk does not take."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error("%s does not take the last records: they are lost", self._store.directory)
            return
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
                with self._lock:
                    self._waiting -= _nbytes(item)
                self._queue.task_done()
        self._queue.task_done()

    def _drop(self, reason: str) -> bool:
        with self._lock:
            self.dropped += 1
            count = self.dropped
        if count == 10 ** (len(str(count)) - 1):  # the 1st, the 10th, the 100th, ...
            log.warning("%d records dropped, the last one because: %s", count, reason)
        return False


def _nbytes(item: tuple[dict[str, Any], dict[str, NDArray[Any]]]) -> int:
    return sum(array.nbytes for array in item[1].values())


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

    @property
    def robot(self) -> Robot:
        return self.policy.robot

    @property
    def no_rtc(self) -> str | None:
        return self.policy.no_rtc

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        noise: ArrayLike | None = None,
        seed: int | None = None,
        num_samples: int = 1,
        num_steps: int | None = None,
        leftover: Leftover | None = None,
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
            observation, prompt=prompt, noise=start, num_samples=num_samples, num_steps=num_steps, leftover=leftover
        )
        self.recorder.write(
            Record(
                observation=observation,
                reply=reply,
                noise=start,
                prompt=prompt,
                num_samples=num_samples,
                num_steps=num_steps,
                leftover=leftover,
                latency_ms=1e3 * (time.perf_counter() - started),
                time=time.time(),
            )
        )
        return reply

    def reset(self) -> None:
        """Begin a new episode, as :meth:`Pi0Policy.reset`. The noise goes on where it was."""
        self.policy.reset()


def describe_policy(policy: Pi0Policy, **sources: Any) -> dict[str, Any]:
    """What a replay needs to know about a policy, as JSON values.

    Args:
        sources: where it came from, as far as known: ``checkpoint``, ``revision``, ``base`` or ``random_weights``
            (the seed), ``tokenizer``, ``norm_stats``, ``asset_id``, ``seed``. None counts as not given.
    """
    return {
        "version": importlib.metadata.version("pi0-engine"),
        "robot": declaration(policy.transform.robot),
        "model": policy.config.to_dict(),
        "rtc": dataclasses.asdict(policy.rtc),
        "sources": {name: value for name, value in sources.items() if value is not None},
        "engine": policy.engine.describe(),
    }

"""A recording as a rerun file: what the cameras saw and what the policy said, over time (extra ``rerun``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0_engine.recording.files import Record
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.observation import read_observation


class RerunFile:
    """Writes an .rrd, one record after another; ``rerun FILE.rrd`` shows it. A context manager.

    Args:
        path: the .rrd file to write.
        robot: says which entries of an observation are cameras and state.

    Raises:
        ValueError: rerun-sdk is not installed, or the file cannot be written.
    """

    def __init__(self, path: str | Path, robot: Robot) -> None:
        try:
            import rerun
        except ImportError:
            raise ValueError("--rerun needs rerun-sdk: pip install 'pi0-engine[rerun]'") from None
        if not Path(path).parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {Path(path).parent}")
        self._rerun, self._robot, self._count = rerun, robot, 0
        self._stream = rerun.RecordingStream("pi0_engine", recording_id=robot.name)
        self._stream.save(str(path))

    def __enter__(self) -> RerunFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.flush()
        self._stream.disconnect()

    def add(self, record: Record, replayed: NDArray[np.floating[Any]] | None = None) -> None:
        """Cameras, state, instruction and chunk of one inference; ``replayed`` actions [H, A] go beside the recorded.

        Of a chunk, the first action is a line over time, and the whole is an image [H, A].
        """
        rr, stream = self._rerun, self._stream
        stream.set_time("inference", sequence=self._count)
        stream.set_time("time", timestamp=record.time)
        self._count += 1
        try:
            seen = read_observation(record.observation, self._robot, record.prompt)
        except ValueError as error:  # a record of an observation that was refused
            stream.log("instruction", rr.TextLog(str(error), level="WARN"))
        else:
            for slot, frame in seen.frames.items():
                stream.log(f"camera/{slot}", rr.Image(np.ascontiguousarray(frame)))
            stream.log("instruction", rr.TextLog(seen.prompt))
            self._numbers("state", seen.state)
        chunks: Mapping[str, Any] = {"actions": record.reply.get("actions"), "replayed": replayed}
        for name, chunk in chunks.items():
            if isinstance(chunk, np.ndarray) and chunk.ndim >= 2 and chunk.size:
                first = chunk.reshape(-1, *chunk.shape[-2:])[0]  # of several candidates, the first
                self._numbers(f"{name}/first", first[0])
                stream.log(f"{name}/chunk", rr.Tensor(first, dim_names=("step", "dimension")))
        if record.latency_ms is not None:
            self._numbers("latency_ms", np.array([record.latency_ms]))

    def _numbers(self, name: str, values: NDArray[np.floating[Any]]) -> None:
        self._stream.log(name, self._rerun.Scalars(values))

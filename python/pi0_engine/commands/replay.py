"""``pi0-engine replay``: does this policy still answer what was recorded?"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from pi0_engine.commands.options import Backend, Dtype, print_json, show_progress, table
from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.model_options import ModelOptions
from pi0_engine.policy import Pi0Policy
from pi0_engine.recording.files import Record, Recording
from pi0_engine.recording.view import RerunFile
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import get_robot, parse_robot
from pi0_engine.robots.guards import check
from pi0_engine.robots.normalization import NormStats
from pi0_engine.rtc.schedule import RtcConfig
from pi0_engine.text.files import demo_tokenizer

#: Rows of the table: all records up to so many, else the worst ones.
_ROWS = 20


def default_tolerance(recorded: dict[str, Any], now: dict[str, Any]) -> tuple[float, str]:
    """Accepted relative L2 between two engines as :meth:`Engine.describe` describes them, and why.

    The same arithmetic on the same machine repeats to the bit, and 1e-6 leaves room for a library that does not.
    float32 anywhere agrees to 2e-5, the bound of `pi0-engine verify`. Anything else is two roundings of one result,
    each within verify's 0.01 of it.
    """
    if recorded == now:
        return 1e-6, "same machine and dtype"
    if recorded.get("dtype") == now["dtype"] == "float32":
        return 2e-5, "float32 on both sides, not the same machine"
    return 2e-2, "another dtype or machine, not float32 on both sides"


@dataclass(frozen=True)
class Replay:
    """Run every record of a recording again and compare the actions.

    Model, robot and engine are the recorded ones where not given. The exit status is 0 if all actions are within the
    tolerance, 1 if not, 2 if the recording or the model cannot be used. Example:

        pi0-engine replay recordings/monday --checkpoint CHECKPOINT --dtype bfloat16
    """

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The recording: what `--record` wrote."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    robot: str | None = None
    """'aloha', 'droid', 'libero', ..., or a declaration file."""
    tokenizer: str | None = None
    """Sentencepiece .model or tokenizer.json."""
    norm_stats: str | None = None
    """Statistics file or directory."""
    asset_id: str | None = None
    """Which statistics, where the checkpoint has several."""
    device: str | None = None
    dtype: Dtype | None = None
    backend: Backend | None = None
    launch_configs: str | None = None
    """Launch configurations that `pi0-engine tune` wrote, instead of those shipped: a GPU rounds by them."""
    limit: int | None = None
    """Only the first so many records."""
    tolerance: float | None = None
    """Largest accepted relative L2; where not given 1e-6 on the recorded machine in the recorded dtype, 2e-5 in float32
    elsewhere, 0.02 otherwise."""
    rerun: str | None = None
    """Write cameras, recorded and replayed actions into this .rrd for the rerun viewer."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}, expected at least 1")
        recording = Recording(self.directory)
        metadata = recording.metadata
        robot = get_robot(self.robot) if self.robot else parse_robot(metadata.get("robot"), self.directory)
        with contextlib.ExitStack() as stack:
            view = stack.enter_context(RerunFile(self.rerun, robot)) if self.rerun else None
            policy = self._policy(metadata, robot)
            rows = self._compare(recording, policy, view)
        for skipped in recording.skipped:
            print(f"pi0-engine: skipped {skipped}", file=sys.stderr)
        tolerance, why = default_tolerance(_map(metadata, "engine"), policy.engine.describe())
        if self.tolerance is not None:
            tolerance, why = self.tolerance, "as given"
        compared = [row for row in rows if "unanswered" not in row]
        if not compared:
            raise ValueError(f"{self.directory} has no record with actions to compare")
        wrong = [row for row in compared if not _badness(row) <= tolerance]
        result = {
            "records": len(rows),
            "compared": len(compared),
            "unanswered": len(rows) - len(compared),
            "wrong": len(wrong),
            "max_rel_l2": max((row["rel_l2"] for row in compared if "rel_l2" in row), default=None),
            "tolerance": tolerance,
            "tolerance_reason": why,
            "passed": not wrong,
            "skipped": recording.skipped,
        }
        if self.json:
            print_json({**result, "rows": rows})
        else:
            _print(result, compared)
        return 1 if wrong else 0

    def _policy(self, metadata: dict[str, Any], robot: Robot) -> Pi0Policy:
        """The recorded policy, with what was given in its place."""
        config = (
            Pi0Config.load(self.model.config) if self.model.config else Pi0Config.from_dict(_map(metadata, "model"))
        )
        source = _map(metadata, "sources")
        model = self.model
        if model.checkpoint is None and model.random_weights is None:
            found: dict[str, Any] = {name: _value(source, name) for name in ("checkpoint", "revision", "base")}
            model = dataclasses.replace(model, random_weights=_value(source, "random_weights", int), **found)
        if model.checkpoint is None and model.random_weights is None:
            raise ValueError("the recording does not say its checkpoint: give --checkpoint or --random-weights")
        is_random, engine = model.random_weights is not None, _map(metadata, "engine")
        return Pi0Policy.from_checkpoint(
            model.open(fallback_config=config),
            robot=robot,
            config=config,
            engine=EngineConfig(
                device=self.device or _value(engine, "device") or "cpu",
                dtype=self.dtype or _value(engine, "dtype") or "auto",
                backend=self.backend or _value(engine, "backend") or "auto",
                attention=_value(engine, "attention") or "auto",
                launch_configs=self.launch_configs,
                solver=_value(engine, "solver") or "euler",  # older recordings do not say: there was no other
            ),
            tokenizer=self.tokenizer or _value(source, "tokenizer") or (demo_tokenizer() if is_random else None),
            norm_stats=self.norm_stats or _value(source, "norm_stats") or (NormStats.identity() if is_random else None),
            asset_id=self.asset_id or _value(source, "asset_id"),
            progress=show_progress(self.json),
            rtc=_rtc(_map(metadata, "rtc")),
        )

    def _compare(self, recording: Recording, policy: Pi0Policy, view: RerunFile | None) -> list[dict[str, Any]]:
        total = len(recording) if self.limit is None else min(self.limit, len(recording))
        rows = []
        with tqdm(total=total, desc="replay", disable=not show_progress(self.json)) as bar:
            for record in itertools.islice(recording, total):
                row, actions = compare(policy, record)
                rows.append(row)
                if view is not None:
                    view.add(record, actions)
                bar.update()
        return rows


def _map(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    value = metadata.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"recording.json: {name} is {value!r:.100}, expected a map")
    return value


def _rtc(section: dict[str, Any]) -> RtcConfig:
    unknown = sorted(set(section) - {field.name for field in dataclasses.fields(RtcConfig)})
    if unknown:
        raise ValueError(f"recording.json: rtc has unknown keys {unknown}")
    return RtcConfig(**section)


def _value(section: dict[str, Any], name: str, kind: type = str) -> Any:
    value = section.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"recording.json: {name} is {value!r:.100}, expected {kind.__name__}")
    return value


def compare(policy: Pi0Policy, record: Record) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Run one record again.

    Returns:
        A row with ``rel_l2`` (where all recorded actions are 0: the absolute L2) and ``max_abs``; or ``error``, why the
        two cannot be compared; or ``unanswered``, where no actions were recorded. Then the new actions, if any.
    """
    recorded = record.reply.get("actions")
    row: dict[str, Any] = {"record": record.name, "recorded_ms": record.latency_ms}
    if not isinstance(recorded, np.ndarray):
        return {**row, "unanswered": str(record.reply.get("error", "no actions"))}, None
    started = time.perf_counter()
    try:
        actions = _answer(policy, record)
    except ValueError as error:
        return {**row, "error": str(error)}, None
    row["replayed_ms"] = 1e3 * (time.perf_counter() - started)
    if actions.shape != recorded.shape:
        return {**row, "error": f"actions {list(actions.shape)}, recorded were {list(recorded.shape)}"}, actions
    expected = recorded.astype(np.float64)
    if not np.isfinite(expected).all():
        return {**row, "error": "the recorded actions are not finite"}, actions
    difference = actions - expected
    rel_l2 = float(np.linalg.norm(difference)) / (float(np.linalg.norm(expected)) or 1.0)
    return {**row, "rel_l2": rel_l2, "max_abs": float(np.abs(difference).max(initial=0.0))}, actions


def _answer(policy: Pi0Policy, record: Record) -> NDArray[np.float32]:
    """The policy's actions, behind the robot's guards if the recorded ones were."""
    reply = policy.infer(
        record.observation,
        prompt=record.prompt,
        noise=record.noise,
        seed=record.seed,
        num_samples=record.num_samples,
        num_steps=record.num_steps,
        leftover=record.leftover,
    )
    actions: NDArray[np.float32] = reply["actions"]
    if record.reply.get("guards") is not None:
        robot = policy.transform.robot
        actions = check(actions, reply["state"], robot.guards, robot.control_hz).actions
    return actions


def _badness(row: dict[str, Any]) -> float:
    return math.inf if "error" in row else float(row["rel_l2"])


def _print(result: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    shown = compared if len(compared) <= _ROWS else sorted(compared, key=_badness, reverse=True)[:_ROWS]
    rows = []
    for row in shown:
        apart = [f"{row[name]:.3e}" if name in row else "-" for name in ("rel_l2", "max_abs")]
        times = [f"{row[name]:.1f}" if row.get(name) is not None else "-" for name in ("recorded_ms", "replayed_ms")]
        rows.append([row["record"], *apart, *times, row.get("error", "")])
    print(table(["record", "rel_l2", "max_abs", "recorded ms", "replayed ms", ""], rows))
    if len(shown) < len(compared):
        print(f"(the {len(shown)} worst of {len(compared)})")
    unanswered = f", {result['unanswered']} recorded without actions" if result["unanswered"] else ""
    print(f"\n{result['compared']} compared, {result['wrong']} beyond the tolerance{unanswered}")
    largest = "-" if result["max_rel_l2"] is None else f"{result['max_rel_l2']:.3e}"
    print(f"max rel_l2 {largest}  (tolerance {result['tolerance']:.1e}: {result['tolerance_reason']})")
    print("PASSED" if result["passed"] else "FAILED")

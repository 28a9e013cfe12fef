"""What a message says: the observation, and beside it what the client asks for under the key ``pi0_engine``.

openpi's clients send the observation alone. Every key of ours may be left out, and an unknown one is an error, so that
a mistyped deadline is not silently none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.observation import Observation, read_observation
from pi0_engine.serving.errors import Refusal
from pi0_engine.serving.wire import short, unpackb

#: What the server says of itself in its metadata: not for others to say.
SERVER_KEYS = frozenset(
    {"server", "version", "protocol", "robot", "model", "control_hz", "prompt", "action_horizon", "action_dim"}
    | {"state_dim", "state_keys", "cameras", "rtc", "guards", "session", "epoch"}
)
#: Of the keys below, and of what the metadata and replies hold.
PROTOCOL = 1
#: Where the client's requests are in the observation map.
KEY = "pi0_engine"
_NAME_LENGTH = 128
#: Characters of an instruction. The model takes 48 or 200 tokens; cutting a book into tokens would hold up the others.
_PROMPT_LENGTH = 4096


@dataclass(frozen=True)
class Continue:
    """Continue a chunk that the robot is executing.

    Attributes:
        executed: of its actions, how many had been executed when the observation was taken.
        delay: how many more will be executed before the answer is there; None leaves it to the server, which counts
            from the latencies of the session.
        sequence: which reply of the session the robot is executing; None is the last.
    """

    executed: int
    delay: int | None
    sequence: int | None


@dataclass(frozen=True, eq=False)
class Request:
    """One message, read and checked.

    Attributes:
        observation: by the robot's declaration; None in a message that only resets.
        sent: the observation as it came, for a recording.
        name: what the client calls the request; echoed.
        reset: begin a new episode first.
        seed: of the noise from here on; None goes on with the session's.
        age_ms: how old the observation was when it was sent.
        deadline_ms: when the answer is wanted, counted from the receipt of the message; None is never.
        continues: the chunk that the new one shall continue.
    """

    observation: Observation | None
    sent: Mapping[str, Any] = field(default_factory=dict)
    name: int | str | None = None
    reset: bool = False
    seed: int | None = None
    age_ms: float = 0.0
    deadline_ms: float | None = None
    continues: Continue | None = None


def read_request(data: bytes | str, robot: Robot) -> Request:
    """Decode a message and hold it against the robot's declaration.

    Raises:
        Refusal: ``malformed_message``, ``bad_request`` or ``bad_observation``.
    """
    if isinstance(data, str):
        raise Refusal("malformed_message", "the message is text, expected binary msgpack")
    try:
        tree = unpackb(data)
    except ValueError as error:
        raise Refusal("malformed_message", f"cannot read the message: {error}") from error
    if not isinstance(tree, dict):
        raise Refusal("malformed_message", f"the message is {type(tree).__name__}, expected a map")
    asked = tree.pop(KEY, {})
    name = _name(asked)
    try:
        request = _read_asked(_Asked(asked, KEY), name)
    except ValueError as error:
        raise Refusal("bad_request", str(error), name) from error
    if request.reset and not tree:
        return request
    try:
        observation = read_observation(tree, robot)
        if len(observation.prompt) > _PROMPT_LENGTH:
            raise ValueError(
                f"the instruction has {len(observation.prompt)} characters, at most {_PROMPT_LENGTH} are read"
            )
    except ValueError as error:
        raise Refusal("bad_observation", str(error), name) from error
    return dataclasses.replace(request, observation=observation, sent=tree)


def _name(asked: Any) -> int | str | None:
    """What the client calls its request, as far as that can be read: refusals carry it too."""
    name = asked.get("request") if isinstance(asked, dict) else None
    return name if type(name) is int or (isinstance(name, str) and len(name) <= _NAME_LENGTH) else None


def _read_asked(asked: _Asked, name: int | str | None) -> Request:
    if asked.get("request", (int, str)) is not None and name is None:
        raise ValueError(f"{KEY}.request has more than {_NAME_LENGTH} characters")
    rtc = asked.get("rtc", dict)
    request = Request(
        observation=None,
        name=name,
        reset=bool(asked.get("reset", bool)),
        seed=asked.count("seed", most=2**63 - 1),
        age_ms=asked.milliseconds("age_ms") or 0.0,
        deadline_ms=asked.milliseconds("deadline_ms"),
        continues=None if rtc is None else _read_continue(_Asked(rtc, f"{KEY}.rtc")),
    )
    asked.done()
    return request


def _read_continue(asked: _Asked) -> Continue:
    executed = asked.count("executed")
    if executed is None:
        raise ValueError(f"{KEY}.rtc.executed is missing")
    result = Continue(executed, asked.count("delay"), asked.count("sequence"))
    asked.done()
    return result


class _Asked:
    """A map of requests, read key by key; :meth:`done` refuses keys that nobody asked for."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where} is {short(data)}, expected a map")
        self._data, self._where, self._read = data, where, set[str]()

    def get(self, key: str, kinds: type | tuple[type, ...]) -> Any:
        self._read.add(key)
        value = self._data.get(key)
        # bool is an int in Python, never on the wire.
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
            raise ValueError(f"{self._where}.{key} is {short(value)}, expected {_KINDS[kinds]}")
        return value

    def count(self, key: str, most: int = 1_000_000) -> int | None:
        value: int | None = self.get(key, int)
        if value is not None and not 0 <= value <= most:
            raise ValueError(f"{self._where}.{key} is {value}, expected 0 to {most}")
        return value

    def milliseconds(self, key: str) -> float | None:
        value = self.get(key, (int, float))
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{self._where}.{key} is {value}, expected milliseconds, 0 or more")
        return None if value is None else float(value)

    def done(self) -> None:
        unknown = sorted(set(self._data) - self._read)
        if unknown:
            raise ValueError(f"{self._where} has the keys {short(unknown)}, expected some of {sorted(self._read)}")


_KINDS: dict[Any, str] = {
    dict: "a map",
    bool: "true or false",
    int: "a whole number",
    (int, float): "a number",
    (int, str): "a number or text",
}


def describe(robot: Robot, model: str, horizon: int) -> dict[str, Any]:
    """What a client is told of the server before its first observation; the session's own keys come on top."""
    return {
        "server": "pi0-engine",
        "version": version("pi0-engine"),
        "protocol": PROTOCOL,
        "robot": robot.name,
        "model": model,
        "action_horizon": horizon,
        "action_dim": robot.action_dim,
        "state_dim": robot.state_dim,
        "state_keys": {part.key: part.size for part in robot.state},
        "cameras": [camera.key for camera in robot.cameras],
        "prompt": robot.prompt,
    }

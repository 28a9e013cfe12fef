"""What a message asks for, and the access rules: every mistake has its code and names what was given."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_client import msgpack_numpy

from pi0_engine.robots.files import get_robot
from pi0_engine.serving.access import Keys, check_exposure, refusal
from pi0_engine.serving.errors import CODES, Refusal
from pi0_engine.serving.example import example_observation
from pi0_engine.serving.protocol import Continue, Request, read_request
from pi0_engine.serving.wire import packb

ROBOTS = ("aloha", "droid", "libero")
LIBERO = get_robot("libero")


def read(controls: Any = ..., **observation: Any) -> Request:
    message = {**example_observation(LIBERO, side=32), **observation}
    return read_request(packb(message if controls is ... else {**message, "pi0_engine": controls}), LIBERO)


def refused(data: bytes | str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_request(data, LIBERO)
    assert caught.value.code in CODES
    return caught.value


@pytest.mark.parametrize("robot", ROBOTS)
def test_an_observation_alone_as_openpi_sends_it(robot: str) -> None:
    given = example_observation(get_robot(robot), side=32, seed=1)
    request = read_request(msgpack_numpy.packb(given), get_robot(robot))
    assert request.observation is not None
    np.testing.assert_array_equal(
        request.observation.state, np.concatenate([given[part.key] for part in get_robot(robot).state])
    )
    slots = [camera.slot for camera in get_robot(robot).cameras if camera.slot]
    assert list(request.observation.frames) == slots
    assert (request.name, request.reset, request.seed, request.age_ms) == (None, False, None, 0.0)
    assert request.deadline_ms is None and request.continues is None


def test_everything_a_client_can_ask_for() -> None:
    rtc = {"executed": 3, "delay": 2, "sequence": 7}
    request = read({"request": "a", "reset": True, "seed": 5, "age_ms": 12, "deadline_ms": 80.5, "rtc": rtc})
    assert request.observation is not None
    assert (request.name, request.reset, request.seed, request.age_ms) == ("a", True, 5, 12.0)
    assert request.deadline_ms == 80.5 and request.continues == Continue(3, 2, 7)
    assert read({"rtc": {"executed": 0}}).continues == Continue(0, None, None)


def test_a_reset_needs_no_observation() -> None:
    request = read_request(packb({"pi0_engine": {"reset": True}}), LIBERO)
    assert request.reset and request.observation is None


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (3, "pi0_engine is 3, expected a map"),
        ({"deadline": 3}, r"has the keys \['deadline'\], expected some of .*deadline_ms"),
        ({"deadline_ms": "soon"}, "deadline_ms is 'soon', expected a number"),
        ({"deadline_ms": -1}, "deadline_ms is -1, expected milliseconds, 0 or more"),
        ({"deadline_ms": float("nan")}, "deadline_ms is nan"),
        ({"age_ms": float("inf")}, "age_ms is inf"),
        ({"reset": 1}, "reset is 1, expected true or false"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"request": [1]}, r"request is \[1\], expected a number or text"),
        ({"request": "x" * 200}, "request has more than 128 characters"),
        ({"rtc": 1}, "rtc is 1, expected a map"),
        ({"rtc": {}}, "rtc.executed is missing"),
        ({"rtc": {"executed": 1.5}}, "rtc.executed is 1.5, expected a whole number"),
        ({"rtc": {"executed": 1, "delya": 2}}, r"rtc has the keys \['delya'\]"),
    ],
)
def test_mistakes_in_our_own_keys(controls: Any, message: str) -> None:
    refusal = refused(packb({**example_observation(LIBERO, side=32), "pi0_engine": controls}))
    assert refusal.code == "bad_request"
    with pytest.raises(Refusal, match=message):
        read(controls)


def test_refusals_carry_the_name_of_the_request() -> None:
    bad = {"observation/state": np.zeros(3), "pi0_engine": {"request": 41}}
    refusal = refused(packb({**example_observation(LIBERO, side=32), **bad}))
    assert json.loads(refusal.to_json()) == {
        "code": "bad_observation",
        "message": "observation key 'observation/state' has shape [3], expected [8]",
        "request": 41,
    }


def test_what_is_no_observation() -> None:
    assert refused("text").code == "malformed_message"
    assert refused(b"\xc1").code == "malformed_message"
    assert refused(packb([1])).code == "malformed_message"
    assert refused(packb({})).code == "bad_observation"
    nan = example_observation(LIBERO, side=32) | {"observation/state": np.full(8, np.nan)}
    assert refused(packb(nan)).code == "bad_observation"
    book = example_observation(LIBERO, side=32) | {"prompt": "x" * 5000}
    assert "the instruction has 5000 characters" in refused(packb(book)).message


def test_keys_are_read_and_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("first\n\n  second \n")
    path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        keys = Keys.read(path)
    assert not caplog.records
    assert keys.admit("Api-Key first") and keys.admit("Api-Key second")
    for wrong in (
        None,
        "",
        "first",
        "Api-Key",
        "Api-Key ",
        "Api-Key third",
        "Bearer first",
        "Api-Key first ",
        "Api-Key f\udcff",
    ):
        assert not keys.admit(wrong), wrong
    assert Keys().admit(None)
    path.chmod(0o644)
    Keys.read(path)
    assert "can be read by others" in caplog.text


def test_key_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the API keys"):
        Keys.read(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no API key"):
        Keys.read(tmp_path / "empty")


def test_who_may_listen_where() -> None:
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        check_exposure(host, Keys(), allow_unauthenticated=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "robot.local", ""):
        with pytest.raises(ValueError, match="--api-key-file"):
            check_exposure(host, Keys(), allow_unauthenticated=False)
        check_exposure(host, Keys((b"key",)), allow_unauthenticated=False)
        check_exposure(host, Keys(), allow_unauthenticated=True)


def test_what_a_request_is_refused_for_before_it_is_served() -> None:
    keys = Keys((b"key",))
    assert refusal(Keys(), [], from_web_page=False) is None
    assert refusal(keys, ["Api-Key key"], from_web_page=True) is None
    for authorizations in ([], ["Api-Key other"], ["Api-Key key", "Api-Key key"]):
        refused = refusal(keys, authorizations, from_web_page=False)
        assert refused is not None and refused[0] == 401
    refused = refusal(Keys(), [], from_web_page=True)
    assert refused is not None and refused[0] == 403

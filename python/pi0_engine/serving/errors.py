"""Why a message was not answered with actions: one code and one sentence, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: Every code of a refusal, and what it says to a client. Most come as error replies; ``unauthorized``, and before a
#: session is open ``queue_full`` and ``shutting_down``, as an HTTP status or a close reason.
CODES: Mapping[str, str] = MappingProxyType(
    {
        "malformed_message": "not a message of this protocol, or beyond its limits",
        "bad_request": "the request's own keys (under 'pi0_engine') are wrong",
        "bad_observation": "the observation does not fit the robot's declaration",
        "stale_observation": "the observation was older than the robot's guards allow when its turn came",
        "deadline_missed": "the deadline passed before inference began",
        "superseded": "a newer observation of the same session took this one's place, or a reset dropped it",
        "queue_full": "too many sessions are waiting",
        "guard_violation": "the actions break the robot's guards, which say to refuse them",
        "not_finite": "the model computed NaN or infinity",
        "inference_failed": "an error inside the server; its log says more",
        "shutting_down": "the server is being stopped",
        "unauthorized": "the handshake carried no valid API key",
    }
)


#: Characters of a message. It may name what a client sent, and that may be long.
_LENGTH = 1000


class Refusal(Exception):
    """A message that gets an error reply.

    Attributes:
        code: one of :data:`CODES`.
        message: a sentence for people.
        request: what the client named its request, if it did and that could be read.
    """

    def __init__(self, code: str, message: str, request: int | str | None = None) -> None:
        assert code in CODES, code
        message = message if len(message) <= _LENGTH else f"{message[: _LENGTH - 3]}..."
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.request = code, message, request

    def to_json(self) -> str:
        """The error reply: a text frame, which openpi's client raises."""
        reply: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.request is not None:
            reply["request"] = self.request
        return json.dumps(reply)

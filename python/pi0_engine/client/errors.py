"""What a policy server's client raises: the server said no, or there is no connection."""

from __future__ import annotations


class PolicyError(Exception):
    """The server answered, but not with actions. The connection stays usable.

    Attributes:
        code: why, in a word (``bad_observation``, ``deadline_missed``, ``guard_violation``, ...); ``unauthorized``
            where the server refused the key, ``server_changed`` where another robot's came back after a
            reconnection, ``server_error`` from a server that gives no codes.
        message: a sentence for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class ConnectionLost(Exception):
    """There is no connection: it broke, the server did not answer in time, or it cannot be reached.

    A request that was on its way may have been computed or not; it is never sent again by itself.
    """

    code = "connection_lost"

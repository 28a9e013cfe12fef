"""Who may connect: API keys, compared in constant time, and where a server without one may listen."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

log = logging.getLogger(__name__)

_SCHEME = "Api-Key "


@dataclass(frozen=True)
class Keys:
    """The keys that open the server; with none, it is open.

    The scheme is openpi's: ``Authorization: Api-Key KEY``.
    """

    keys: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Keys:
        """One key per line; blank lines are skipped.

        Raises:
            ValueError: a file that cannot be read or holds no key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # an editor's byte order mark is not part of a key
            others_may_read = os.stat(path).st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the API keys: {error}") from error
        keys = tuple(line.strip().encode() for line in text.splitlines() if line.strip())
        if not keys:
            raise ValueError(f"{path} holds no API key, expected one per line")
        if others_may_read:
            log.warning("%s can be read by others on this machine: chmod 600 %s", path, path)
        return cls(keys)

    def admit(self, authorization: str | None) -> bool:
        """Whether the header's value carries one of the keys.

        Every key is compared, each in a time that does not depend on where it differs.
        """
        if not self.keys:
            return True
        given = (authorization or "").removeprefix(_SCHEME).encode("utf-8", "surrogateescape")
        fits = [hmac.compare_digest(given, key) for key in self.keys]
        return any(fits) and (authorization or "").startswith(_SCHEME)


def refusal(keys: Keys, authorizations: Sequence[str], *, from_web_page: bool) -> tuple[HTTPStatus, str] | None:
    """Why a request is not served, as an HTTP status and a sentence; None serves it.

    Args:
        keys: of the server.
        authorizations: the values of all its Authorization headers.
        from_web_page: whether it has an Origin header, as browsers send: any page that is open on this machine could
            otherwise use a server that listens to this machine only.
    """
    if not keys.admit(authorizations[0] if len(authorizations) == 1 else None):
        return HTTPStatus.UNAUTHORIZED, "expected the header 'Authorization: Api-Key KEY'\n"
    if not keys.keys and from_web_page:
        return HTTPStatus.FORBIDDEN, "a web page needs a server with API keys\n"
    return None


def check_exposure(host: str, keys: Keys, *, allow_unauthenticated: bool) -> None:
    """Refuse to serve a robot's brain to a whole network by accident.

    Raises:
        ValueError: a host other than loopback, without keys and without being told to.
    """
    if keys.keys or allow_unauthenticated or _is_loopback(host):
        return
    raise ValueError(
        f"--host {host} can be reached from other machines, and no key is asked of them: give --api-key-file, "
        "or --allow-unauthenticated if the network itself is guarded"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

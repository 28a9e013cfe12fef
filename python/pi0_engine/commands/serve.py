"""``pi0-engine serve``: a policy server for openpi's clients, and for ours."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import NoReturn

from pi0_engine.serving.options import ServeOptions
from pi0_engine.serving.ray_run import run_fleet
from pi0_engine.serving.server import PolicyServer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serve(ServeOptions):
    """Serve a policy on openpi's websocket protocol.

    A robot that talks to openpi changes one address. Prints one line, `ready on ws://HOST:PORT`, when the policy has
    answered once; the log goes to stderr. `GET /healthz` answers from the start, `/readyz` from then on, `/metrics`
    is for Prometheus. SIGTERM ends it when the answers under way are out: status 0, or 1 if that took longer than
    --drain-s. docs/serving.md says more. Example:

        pi0-engine serve --checkpoint CHECKPOINT --robot droid --device cuda
    """

    def run(self) -> int:
        logging.getLogger("pi0_engine").setLevel(logging.INFO if self.verbose else logging.WARNING)
        options = self.server()
        if self.ray:
            run_fleet(self.replica(), self.fleet, options, on_ready=_say_ready)
            return 0
        server = PolicyServer(self.service(), options, on_ready=_say_ready)
        try:
            asyncio.run(_until_signalled(server))
        except RuntimeError:
            if server.drained:
                raise
            log.exception("the server has ended")
        if not server.drained:
            _end_process(1)
        return 0


def _say_ready(address: str) -> None:
    print(f"ready on {address}", flush=True)


async def _until_signalled(server: PolicyServer) -> None:
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)

    def stop() -> None:
        for number in numbers:  # a second signal ends the process at once
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # SIGINT too, which would raise and then wait for the drain
        server.stop()

    for number in numbers:
        loop.add_signal_handler(number, stop)
    await server.run()


def _end_process(status: int) -> NoReturn:
    """Exit around a thread that is still computing: it would abort the process while the interpreter is taken down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

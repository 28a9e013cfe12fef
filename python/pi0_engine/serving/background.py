"""A server in a thread of this process: for measurements, tests and notebooks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from types import TracebackType

from pi0_engine.serving.server import PolicyServer, ServerOptions
from pi0_engine.serving.service import Service


class BackgroundServer:
    """Starts at once; as a context manager it waits until the policy is warm, and stops at the end.

    Args:
        service: not yet started.
        options: see there.

    Attributes:
        address: resolved to ``ws://HOST:PORT`` when the policy is warm; to what kept it from that otherwise.
        ended: resolved when the server has stopped; to what stopped it if that was an error.
    """

    def __init__(self, service: Service, options: ServerOptions) -> None:
        self.service, self._options = service, options
        self.address: Future[str] = Future()
        self.ended: Future[None] = Future()
        threading.Thread(target=self._run, name="server", daemon=True).start()

    @property
    def port(self) -> int:
        """Waits until the policy is warm."""
        return int(self.address.result().rpartition(":")[2])

    @property
    def port_while_loading(self) -> int:
        """Of a server that listens already, ready or not."""
        return int(self.server.address.rpartition(":")[2])

    def stop(self) -> None:
        """Begin to drain."""
        self._loop.call_soon_threadsafe(self.server.stop)

    def __enter__(self) -> BackgroundServer:
        self.address.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ended.done():
            self.stop()
            self.ended.result()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self.address.done():
                self.address.set_exception(error)
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.server = PolicyServer(self.service, self._options, on_ready=self.address.set_result)
        await self.server.run()

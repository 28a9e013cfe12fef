"""A fleet: one engine per replica of a Ray Serve application, the same wire through its ingress (docs/fleet.md).

A websocket stays with one replica for its life, and a session is a connection, so sessions need no other stickiness.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import tyro

from pi0_engine.serving.asgi import GOING_AWAY, Application, Receive, Send, lifespan
from pi0_engine.serving.fleet import FleetOptions, ReplicaOptions, merge_expositions
from pi0_engine.serving.options import ServeOptions
from pi0_engine.serving.service import Service

log = logging.getLogger(__name__)

#: Beside the open sessions, a replica answers handshakes that it refuses, probes and metrics.
_SPARE_REQUESTS = 32
#: How long replicas may take to say how they are: seconds. Prometheus waits as long.
_METRICS_S = 10.0


class Replica:
    """One engine in a process of its own. Ray makes it, and asks it how it is.

    The constructor returns when the policy is warm: only then does Ray send clients. Raises what loading it raises.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        from ray import serve

        logging.getLogger("pi0_engine").setLevel(logging.INFO if options.verbose else logging.WARNING)
        context = serve.get_replica_context()
        self._name, self._drain_s = context.replica_tag, options.drain_s
        self._all = serve.get_deployment_handle(context.deployment, context.app_name)
        metadata = {"replica": self._name, **options.service.metadata}
        self.service = Service(options.load, dataclasses.replace(options.service, metadata=metadata))
        self.application = Application(
            self.service, options.keys, int(options.max_message_mb * 1e6), self._fleet_exposition
        )
        self.service.start()
        self.service.ready.result()

    async def check_health(self) -> None:
        """Ray replaces a replica for which this fails."""
        if self.service.broken.done():
            raise RuntimeError(self.service.broken.result())

    async def drain(self) -> bool:
        """Answer what is under way, then say goodbye; whether that was done in time."""
        self.service.stop()
        in_time = await asyncio.to_thread(self.service.finish, self._drain_s)
        await asyncio.sleep(0.05)  # what was answered last is on its way
        await self.application.close(GOING_AWAY, "the server is being stopped")
        return in_time

    async def exposition(self) -> tuple[str, bytes]:
        """Name and metrics of this replica."""
        return self._name, self.service.metrics.exposition()[1]

    async def _fleet_exposition(self) -> tuple[str, bytes]:
        """Metrics of all replicas: whoever asks cannot choose which of them is asked."""
        answers = await self._all.broadcast("exposition").results_async(timeout_s=_METRICS_S, return_exceptions=True)
        lost = [answer for answer in answers if isinstance(answer, BaseException)]
        if lost:
            log.warning("%d of %d replicas gave no metrics: %s", len(lost), len(answers), lost[0])
        return merge_expositions(dict(answer for answer in answers if not isinstance(answer, BaseException)))


def app(args: Mapping[str, Any]) -> Any:
    """For Ray's own command and configuration files: the options of ``pi0-engine serve`` by their names.

        serve run pi0_engine.serving.ray_app:app robot=droid checkpoint=DIR device=cuda api_key_file=KEYS

    Args:
        args: ``max_sessions: 8`` for ``--max-sessions 8``, ``true`` for a flag, a list for several values; ``false``
            and None as if the option were not there.

    Raises:
        ValueError: options that make no server, options that are Ray's to decide, or neither keys nor
            ``allow_unauthenticated``: where Ray listens is not known here.
    """
    for name in ("ray", "host", "port", "tls_cert", "tls_key"):
        if name in args:
            raise ValueError(f"{name} is given: Ray decides it (http_options, docs/fleet.md)")
    words = [word for name, value in args.items() for word in _words(name, value)]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            command = tyro.cli(ServeOptions, args=words, prog="ray_app:app", config=config)
    except SystemExit as ended:
        raise ValueError(f"{dict(args)} are no options of a server:\n{told.getvalue()}") from ended
    if not (command.api_key_file or command.allow_unauthenticated):
        raise ValueError("expected api_key_file, or allow_unauthenticated if the network itself is guarded")
    return application(command.replica(), command.fleet)


def _words(name: str, value: Any) -> list[str]:
    """An option as the command line has it: none where the value is None or false."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False or value == "false":
        return []
    if value is True or value == "true":
        return [option]
    if isinstance(value, Mapping):
        return [option, json.dumps(value)]
    return [option, *(str(each) for each in (value if isinstance(value, list | tuple) else [value]))]


def application(options: ReplicaOptions, fleet: FleetOptions) -> Any:
    """The Ray Serve application, for ``serve.run``.

    Raises:
        ValueError: Ray Serve is not installed, or would open ports that nobody asked for.
    """
    serve = ray_serve()
    actor = {"num_cpus": fleet.cpus_per_replica, "num_gpus": 1 if options.device == "cuda" else 0}
    deployment = serve.deployment(
        name="Policy",
        # An open websocket counts. With room to spare, a session too many reaches a replica and is told so, instead of
        # waiting at the proxy.
        max_ongoing_requests=options.service.max_sessions + _SPARE_REQUESTS,
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=10,
        max_constructor_retry_count=2,  # what cannot be loaded once cannot be loaded twice
        logging_config=logging_options(options),
        **fleet.scaling(),
    )
    return deployment(serve.ingress(_ingress)(Replica)).bind(options)


def logging_options(options: ReplicaOptions) -> dict[str, Any]:
    """What Ray Serve itself logs."""
    return {"log_level": "INFO" if options.verbose else "WARNING", "enable_access_log": options.verbose}


def _ingress() -> Any:
    """Ray asks for the ASGI application before it tells who the replica is."""

    async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        else:
            await ray_serve().get_replica_context().servable_object.application(scope, receive, send)

    return answer


def ray_serve() -> Any:
    """``ray.serve``.

    Raises:
        ValueError: it is not installed, or the environment makes its replicas listen on ports of their own.
    """
    # Ray calls home with statistics of use; a robot's computer has no business to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        if os.environ.get(name, "0") != "0":
            raise ValueError(f"unset {name}: with it replicas listen on all interfaces, whatever --host says")
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError("Ray Serve is not installed: pip install 'pi0-engine[ray]'") from error
    return serve

"""``pi0-engine serve --ray`` from start to drain: a Ray of its own on this machine, or a cluster that is there."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from pi0_engine.serving.fleet import FleetOptions, ReplicaOptions
from pi0_engine.serving.ray_app import application, logging_options, ray_serve
from pi0_engine.serving.server import ServerOptions

log = logging.getLogger(__name__)

_NAME = "pi0-engine"
#: From the replicas' being warm to the proxy's knowing of them: seconds.
_ROUTE_S = 60.0


def run_fleet(
    replica: ReplicaOptions, fleet: FleetOptions, server: ServerOptions, *, on_ready: Callable[[str], Any] = log.info
) -> None:
    """Start Ray, deploy, serve until SIGTERM or SIGINT, drain. To be called in the main thread.

    Args:
        replica, fleet: see there.
        server: host, port and certificate of the ingress.
        on_ready: called with its address when all replicas are warm.

    Raises:
        ValueError: what cannot be served, or not here; on a cluster (``RAY_ADDRESS``) also port 0.
        KeyboardInterrupt: a signal before all replicas are warm, or a second one.
    """
    fleet.scaling()  # what is wrong with the options is said before Ray is started
    server.tls()
    if not _is_local() and server.port == 0:
        raise ValueError("--port is 0, expected one that is free on every machine of the cluster")
    with _ray(replica, fleet) as serve, _term_interrupts():
        port = _free_port(server.host, server.port) if _is_local() else server.port
        http: dict[str, Any] = {"host": server.host, "port": port}
        if server.tls_cert is not None:
            http["ssl_certfile"] = os.path.abspath(server.tls_cert)
            http["ssl_keyfile"] = os.path.abspath(server.tls_key or "")
        serve.start(http_options=http, logging_config=logging_options(replica))
        try:
            handle = _deploy(serve, application(replica, fleet))
            if _is_local():
                _wait_for_route(server, port)
            with contextlib.suppress(KeyboardInterrupt):
                on_ready(_address(server, port))
                threading.Event().wait()
            _drain(handle, replica.drain_s)
        finally:
            serve.shutdown()


def _is_local() -> bool:
    return "RAY_ADDRESS" not in os.environ


def _address(server: ServerOptions, port: int) -> str:
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{'wss' if server.tls_cert else 'ws'}://{host}:{port}"


@contextlib.contextmanager
def _ray(replica: ReplicaOptions, fleet: FleetOptions) -> Iterator[Any]:
    """``ray.serve`` in a Ray that runs; one that was started here is stopped at the end."""
    options: dict[str, Any] = {"logging_level": logging.INFO if replica.verbose else logging.WARNING}
    if _is_local():
        # Whoever reaches Ray's own ports runs code as us: they stay on this machine, and ask for a token. Ray reads
        # this when it is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"address": "local", "include_dashboard": False}
    serve = ray_serve()
    import ray

    ray.init(**options)
    try:
        if _is_local():
            _check_resources(ray.cluster_resources(), replica, fleet)
        elif serve.status().proxies:
            raise ValueError(
                "Ray Serve runs on this cluster already, and its address is not ours to choose: deploy there with "
                "`serve run pi0_engine.serving.ray_app:app` (docs/fleet.md)"
            )
        yield serve
    finally:
        ray.shutdown()


def _check_resources(has: dict[str, float], replica: ReplicaOptions, fleet: FleetOptions) -> None:
    """Ray would wait for another machine for ever."""
    most = fleet.most
    needs = {"CPU": most * fleet.cpus_per_replica, "GPU": most if replica.device == "cuda" else 0}
    for kind, count in needs.items():
        if count > has.get(kind, 0):
            raise ValueError(f"{most} replicas need {count:g} {kind}s, this machine has {has.get(kind, 0):g}")


def _deploy(serve: Any, app: Any) -> Any:
    try:
        return serve.run(app, name=_NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[_NAME].deployments.values()
        text = "\n".join([str(error), *(deployment.message for deployment in deployments)]).strip()
        raise ValueError(f"the replicas cannot start: {text.splitlines()[-1]}") from error  # the end of a traceback


def _wait_for_route(server: ServerOptions, port: int) -> None:
    """Ask the proxy until a replica answers through it."""
    wildcards = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = wildcards.get(server.host, server.host)
    url = f"{'https' if server.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/readyz"
    unverified = ssl.create_default_context()  # this machine's own certificate need not name the loopback address
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    end = time.monotonic() + _ROUTE_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=_ROUTE_S, context=unverified).close()
        except (OSError, urllib.error.URLError) as error:
            if time.monotonic() > end:
                raise ValueError(f"the replicas are warm, but {url} does not answer: {error}") from error
            time.sleep(0.05)
        else:
            return


def _drain(handle: Any, drain_s: float) -> None:
    """Every replica answers what is under way; then it is stopped."""
    try:
        in_time = handle.broadcast("drain").results(timeout_s=drain_s + 5, return_exceptions=True)
    except Exception as error:
        in_time = [error]
    if in_time != [True] * len(in_time):
        log.warning("not every replica answered all in %s s: %s", drain_s, in_time)


@contextlib.contextmanager
def _term_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does: Ray's own handler would abort."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port(host: str, port: int) -> int:
    """``port``, if it is free; for 0 one that is: Ray's proxy cannot say which it took."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port}: {error}") from error
        return int(probe.getsockname()[1])

"""What a fleet is asked to be, and what its replicas tell Prometheus. Needs no Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pi0_engine.policy import Pi0Policy
from pi0_engine.serving.access import Keys
from pi0_engine.serving.service import ServiceOptions

#: Ray's proxies are uvicorn's with its default limit, and Ray has no option for it: bytes.
PROXY_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class FleetOptions:
    """How many engines, and what each may have. With --ray."""

    replicas: int = 1
    """Engines, each in a process of its own: with --device cuda, each on a GPU of its own."""
    autoscale: tuple[int, int] | None = None
    """Instead of --replicas: between so many and so many, after the number of open sessions."""
    target_sessions: float = 4.0
    """With --autoscale: the sessions per replica that it aims for."""
    autoscaling: str | None = None
    """With --autoscale: further options of Ray's AutoscalingConfig as JSON, e.g. '{"downscale_delay_s": 60}'."""
    cpus_per_replica: float = 1.0
    """CPUs that Ray sets aside for each replica, and threads of its torch."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"--replicas is {self.replicas}, expected at least 1")
        if self.autoscale is None:
            given = [name for name in ("target_sessions", "autoscaling") if getattr(self, name) != _default(name)]
            if given:
                raise ValueError(f"--{given[0].replace('_', '-')} is given without --autoscale MIN MAX")
        elif self.replicas != _default("replicas"):
            raise ValueError("expected --replicas or --autoscale MIN MAX, not both")
        elif not 1 <= self.autoscale[0] <= self.autoscale[1]:
            raise ValueError(f"--autoscale is {self.autoscale}, expected 1 <= MIN <= MAX")
        if not self.cpus_per_replica > 0 or not self.target_sessions > 0:
            raise ValueError(
                f"--cpus-per-replica is {self.cpus_per_replica}, --target-sessions {self.target_sessions}: "
                "expected above 0"
            )

    @property
    def most(self) -> int:
        """Replicas that there may be at a time."""
        return self.autoscale[1] if self.autoscale else self.replicas

    def scaling(self) -> dict[str, Any]:
        """The options of a Ray Serve deployment that say how many replicas it has.

        Raises:
            ValueError: ``autoscaling`` is not a JSON object.
        """
        if self.autoscale is None:
            return {"num_replicas": self.replicas}
        try:
            further = json.loads(self.autoscaling or "{}")
        except ValueError as error:
            raise ValueError(f"--autoscaling is not JSON: {error}") from error
        if not isinstance(further, dict):
            raise ValueError(f"--autoscaling is {self.autoscaling}, expected a JSON object")
        least, most = self.autoscale
        # An open websocket is an ongoing request to Ray for as long as it is open.
        config = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": self.target_sessions}
        return {"autoscaling_config": config | further}


def _default(name: str) -> Any:
    return FleetOptions.__dataclass_fields__[name].default


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is made of. Goes to other processes and machines: it must be picklable.

    Attributes:
        load: makes the policy, in the replica.
        service: as of a server without Ray; ``max_sessions`` and ``max_waiting`` are those of each replica.
        keys: who may connect.
        max_message_mb, drain_s: as of a server without Ray.
        device: of the engine: ``cpu`` or ``cuda``.
        verbose: log every refused message.
    """

    load: Callable[[], Pi0Policy]
    service: ServiceOptions
    keys: Keys
    max_message_mb: float
    drain_s: float
    device: str
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}, expected 'cpu' or 'cuda': Ray gives each replica its GPU")
        if self.max_message_mb * 1e6 > PROXY_LIMIT:
            raise ValueError(
                f"--max-message-mb is {self.max_message_mb}, expected at most {PROXY_LIMIT / 1e6:.3f} with --ray: "
                "larger messages do not pass Ray's proxy"
            )


def merge_expositions(replicas: Mapping[str, bytes]) -> tuple[str, bytes]:
    """One ``/metrics`` out of those of all replicas: every sample gets the label ``replica``.

    Args:
        replicas: name of a replica -> the body that it would answer with.

    Returns:
        Content type and body.
    """
    import prometheus_client
    from prometheus_client.metrics_core import Metric
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Any] = {}
    answering = Metric("pi0_replicas", "Replicas that answered for these metrics", "gauge")
    answering.add_sample("pi0_replicas", {}, len(replicas))
    families[answering.name] = answering
    for replica, text in replicas.items():
        for family in text_string_to_metric_families(text.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry: Any = SimpleNamespace(collect=families.values)
    return prometheus_client.CONTENT_TYPE_LATEST, prometheus_client.generate_latest(registry)

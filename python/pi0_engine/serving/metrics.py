"""What Prometheus is told at ``/metrics``. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pi0_engine.serving.errors import CODES

#: Seconds: from a GPU's few milliseconds to a CPU's several seconds.
_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


class Metrics:
    """Counters and histograms of one server.

    Args:
        waiting: gives the number of waiting sessions.
        sessions: gives the number of open ones.

    Raises:
        ValueError: prometheus-client is not installed.
    """

    def __init__(self, waiting: Callable[[], int], sessions: Callable[[], int]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ValueError("prometheus-client is not installed: pip install 'pi0-engine[serve]'") from error
        self._prometheus: Any = prometheus
        self._registry = registry = prometheus.CollectorRegistry()

        def histogram(name: str, text: str) -> Any:
            return prometheus.Histogram(f"pi0_{name}_seconds", text, buckets=_BUCKETS, registry=registry)

        self._total = histogram("request", "Receipt of an observation to its reply with actions")
        self._infer = histogram("inference", "Pi0Policy.infer: preparation, network, robot units")
        self._queue = histogram("queue", "Receipt of an observation to the beginning of its inference")
        self._rejected = prometheus.Counter("pi0_rejected", "Messages refused, by reason", ["code"], registry=registry)
        for code in CODES:  # so that a code that has not occurred yet reads 0
            self._rejected.labels(code)
        self._guarded = prometheus.Counter(
            "pi0_guarded", "Chunks that the robot's guards changed", ["applied"], registry=registry
        )
        for applied in ("clip", "hold"):
            self._guarded.labels(applied)
        self._deadlines = prometheus.Counter(
            "pi0_deadlines", "Requests with a deadline, by outcome", ["outcome"], registry=registry
        )
        for outcome in ("met", "missed"):
            self._deadlines.labels(outcome)
        gauges = {"waiting": ("Sessions that wait for the engine", waiting), "sessions": ("Open sessions", sessions)}
        for name, (text, read) in gauges.items():
            prometheus.Gauge(f"pi0_{name}", text, registry=registry).set_function(read)

    def answered(self, *, total_s: float, infer_s: float, queue_s: float) -> None:
        self._total.observe(total_s)
        self._infer.observe(infer_s)
        self._queue.observe(queue_s)

    def refused(self, code: str) -> None:
        self._rejected.labels(code).inc()

    def guarded(self, applied: str) -> None:
        self._guarded.labels(applied).inc()

    def deadline(self, met: bool) -> None:
        self._deadlines.labels("met" if met else "missed").inc()

    def exposition(self) -> tuple[str, bytes]:
        """Content type and body of ``/metrics``."""
        return self._prometheus.CONTENT_TYPE_LATEST, self._prometheus.generate_latest(self._registry)

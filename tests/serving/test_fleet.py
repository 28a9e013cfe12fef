"""What a fleet may be asked to be, and metrics of several replicas in one."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pi0_engine.serving.fleet import FleetOptions, merge_expositions
from pi0_engine.serving.metrics import Metrics


def test_scaling_is_what_ray_serve_is_told() -> None:
    assert FleetOptions().scaling() == {"num_replicas": 1}
    assert FleetOptions(replicas=3).scaling() == {"num_replicas": 3} and FleetOptions(replicas=3).most == 3
    fleet = FleetOptions(autoscale=(1, 4), autoscaling='{"downscale_delay_s": 60, "target_ongoing_requests": 2}')
    assert fleet.most == 4
    assert fleet.scaling() == {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": 2,
            "downscale_delay_s": 60,
        }
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "--replicas is 0, expected at least 1"),
        ({"replicas": 2, "autoscale": (1, 2)}, "not both"),
        ({"autoscale": (3, 2)}, "expected 1 <= MIN <= MAX"),
        ({"autoscale": (0, 2)}, "expected 1 <= MIN <= MAX"),
        ({"target_sessions": 2.0}, "--target-sessions is given without --autoscale"),
        ({"autoscaling": "{}"}, "--autoscaling is given without --autoscale"),
        ({"cpus_per_replica": 0.0}, "--cpus-per-replica is 0.0"),
        ({"autoscale": (1, 2), "autoscaling": "{"}, "--autoscaling is not JSON"),
        ({"autoscale": (1, 2), "autoscaling": "[1]"}, "expected a JSON object"),
    ],
)
def test_options_that_make_no_fleet(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FleetOptions(**options).scaling()


def test_metrics_of_replicas_are_told_apart_by_a_label() -> None:
    expositions = {}
    for name, count in (("a", 1), ("b", 5)):
        metrics = Metrics(lambda: 0, lambda count=count: count)  # type: ignore[misc]
        for _ in range(count):
            metrics.answered(total_s=0.5, infer_s=0.25, queue_s=0.01)
            metrics.refused("queue_full")
        expositions[name] = metrics.exposition()[1]
    kind, merged = merge_expositions(expositions)
    assert kind.startswith("text/plain")
    alone = list(text_string_to_metric_families(expositions["a"].decode()))
    families = {family.name: family for family in text_string_to_metric_families(merged.decode())}
    assert set(families) == {family.name for family in alone} | {"pi0_replicas"}
    for family in alone:
        whole = families[family.name]
        assert (whole.type, whole.documentation) == (family.type, family.documentation)
        for sample in family.samples:
            assert (sample.name, {**sample.labels, "replica": "a"}, sample.value) in [
                each[:3] for each in whole.samples
            ]

    def value(name: str, **labels: str) -> float:
        found = [each.value for family in families.values() for each in family.samples if each[:2] == (name, labels)]
        assert len(found) == 1
        return found[0]

    assert value("pi0_replicas") == 2
    assert value("pi0_sessions", replica="b") == 5
    assert value("pi0_request_seconds_count", replica="b") == 5
    assert value("pi0_request_seconds_bucket", le="0.5", replica="b") == 5
    assert value("pi0_rejected_total", code="queue_full", replica="a") == 1

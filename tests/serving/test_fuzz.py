"""A short run of the fuzzer; ``make fuzz`` is the long one."""

from __future__ import annotations

from tests.support.fuzz_server import fuzz
from tests.support.serving import needs_torch


@needs_torch
def test_hostile_clients_are_refused_while_good_ones_are_served() -> None:
    report = fuzz(2000, seed=0)
    assert not report.problems
    assert report.messages == 2000 and len(report.good) > 50
    assert {"1002", "1007", "1009", "closed", "left"} <= set(report.endings)
    assert {"malformed_message", "bad_observation", "bad_request"} <= set(report.codes)
    assert not {"inference_failed", "not_finite"} & set(report.codes)
    assert report.growth_mb < 50

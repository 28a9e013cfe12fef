"""Options of ``pytest benchmarks/bench_kernels.py``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--kernels-config", default="pi0", help="'pi0', 'pi05' or a JSON file of sizes")
    group.addoption("--kernels-views", default="2", help="cameras, for example 1,2,3")
    group.addoption("--kernels-dtype", default="bfloat16")
    group.addoption("--kernels-device", default="cuda", help="'cpu' runs the torch meanings alone, for a quick look")

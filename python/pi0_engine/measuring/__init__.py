"""How right and how fast: parity cases, benchmarks, profiles, floors, plots (docs/profiling.md, docs/parity.md).

In: an engine, a policy or a server. Out: JSON-ready numbers, each with what it was measured on.
"""

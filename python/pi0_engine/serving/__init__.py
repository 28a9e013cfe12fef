"""A policy server on openpi's websocket protocol: ``pi0-engine serve`` (docs/serving.md)."""

"""Ops of the engine: meaning (torch), implementations, cost. Start at ``registry.py``."""

"""Ops of the engine: meaning (torch), implementations, cost. Start at ``registry.py``.

In: tensors and preallocated outputs. Out: those outputs, written by whichever implementation was chosen.
"""

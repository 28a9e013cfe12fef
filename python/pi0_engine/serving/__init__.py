"""A policy server: openpi's websocket protocol, sessions, guards, keys, metrics, fleets (docs/serving.md).

In: messages and a policy, whatever computes its chunks. Out: replies, or refusals with a code. It imports no torch.
"""

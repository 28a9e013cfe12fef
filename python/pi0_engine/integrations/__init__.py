"""This engine inside other people's programs (docs/lerobot.md).

In: their policy, loaded. Out: the same policy, its sampling done by our engine.
"""

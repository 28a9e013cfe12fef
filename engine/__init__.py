"""The inference engine: plan, packed weights, stages, graphs. Start at ``runtime.py``.

In: a checkpoint's tensors, then observations as ``ModelInputs`` (numpy) and noise. Out: normalised actions.
"""

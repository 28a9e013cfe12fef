"""The oracle: π0 and π0.5 in plain PyTorch, nothing fused, nothing shared with the engine that it judges.

In: tensors as the published models take them. Out: actions. It imports ``config`` and nothing else of the project.
"""

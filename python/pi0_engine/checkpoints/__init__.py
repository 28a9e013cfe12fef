"""Checkpoints of openpi (PyTorch and JAX), lerobot and this project.

In: a file, a folder or a Hub id. Out: the model's sizes, and its tensors under canonical names, one at a time.
torch's side of the house, but for ``folder``, ``names`` and ``parameters``, which only know where things lie.
"""

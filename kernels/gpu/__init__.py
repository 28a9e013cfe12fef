"""Triton kernels of the ops, one file per family beside the meanings in ``kernels/``. Start at ``launch.py``.

In: device tensors and a launch configuration. Out: the same outputs as the meanings' within a stated rounding.
"""

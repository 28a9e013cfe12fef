"""Triton kernels of the ops, one file per family beside the meanings in ``kernels/``. Start at ``launch.py``."""

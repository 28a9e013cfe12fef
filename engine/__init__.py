"""The inference engine: plan, packed weights, stages, runtime. Start at ``runtime.py``."""

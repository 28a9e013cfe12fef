"""Launch configurations from measurements (docs/profiling.md).

In: the ops of an inference and a GPU. Out: the fastest tile sizes that compute the right numbers, as rules.
"""

"""GPU memory: how much an engine needs, and an error that says so where it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pi0_engine.config import Pi0Config
from pi0_engine.engine.weights import pack_weights, shapes_only

#: Beside the weights: 32 MiB of scratch, buffers of some plans at about 40 MB, their graphs, CUDA's modules.
_WORKING_BYTES = 400 << 20


def weight_bytes(config: Pi0Config, dtype: torch.dtype) -> int:
    """Bytes of the packed weights, counted without a checkpoint. The embedding table stays on the host."""
    return pack_weights(shapes_only(config), dtype, torch.device("meta")).packed_bytes


def check_free_memory(config: Pi0Config, dtype: torch.dtype, device: torch.device) -> None:
    """Before anything is loaded.

    Raises:
        MemoryError: what is needed and what is free, in GB.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds for later use is free to us as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    weights = weight_bytes(config, dtype)
    if weights + _WORKING_BYTES > free:
        raise MemoryError(
            f"{torch.cuda.get_device_name(device)} has {free / 1e9:.2f} of {total / 1e9:.2f} GB free, but "
            f"{(weights + _WORKING_BYTES) / 1e9:.2f} GB are needed: {weights / 1e9:.2f} for the weights in "
            f"{str(dtype).removeprefix('torch.')} and {_WORKING_BYTES / 1e9:.2f} to work in"
        )


@contextmanager
def reporting_memory(device: torch.device, what: str) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that names what did not fit and what is free."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise MemoryError(
            f"{what} did not fit: {free / 1e9:.2f} of {total / 1e9:.2f} GB are free on {device}. {error}"
        ) from error

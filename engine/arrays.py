"""numpy arrays, in which inputs come, as the tensors that the engine computes with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensor(array: NDArray[Any] | Tensor) -> Tensor:
    """A tensor on the array's own memory; a tensor as it is.

    A copy only of what torch cannot look at: arrays that are read-only, read backwards along an axis, parts of records,
    or of another byte order.

    Raises:
        ValueError: something else than numbers that torch has a dtype for.
    """
    if isinstance(array, Tensor):
        return array
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        given = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"given is {given}, expected numbers in a numpy array or a tensor")
    strange = any(stride < 0 or stride % array.dtype.itemsize for stride in array.strides)
    if strange or not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)

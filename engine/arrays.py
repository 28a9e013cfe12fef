"""numpy arrays, in which inputs come, as the tensors that the engine computes with."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensor(array: NDArray[Any] | Tensor) -> Tensor:
    """A tensor on the array's own memory; a tensor as it is.

    A copy only of what torch cannot look at: arrays that are read-only, or read backwards along an axis.
    """
    if isinstance(array, Tensor):
        return array
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)

"""Normalisation statistics: between the units of a robot and the units a checkpoint was trained in.

Every mode is an affine map per dimension, so a :class:`Normalizer` is three vectors and the rule that made them.
openpi's and lerobot's rules differ in where a small epsilon goes; the files in a checkpoint say which one holds.
Formulas: openpi ``transforms.py`` (Normalize, Unnormalize), lerobot ``processor/normalize_processor.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mode = Literal["zscore", "quantile", "minmax", "identity"]
Flavour = Literal["openpi", "lerobot"]
FloatArray = NDArray[np.floating[Any]]

_OPENPI_EPS = 1e-6
_LEROBOT_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Normalizer:
    """An affine map per dimension, applied along the last axis. Build one with the class methods.

    ``zscore``: y = (x - offset) / divisor, x = y * multiplier + offset.
    ``quantile``, ``minmax``: y = (x - offset) / divisor * 2 - 1, x = (y + 1) / 2 * multiplier + offset.

    A vector with more dimensions than the statistics keeps its extra dimensions unchanged (the zero padding of
    states and actions); one with fewer uses the first statistics (files may be padded to the model's width).
    Nothing is clipped. Arithmetic is float64 for openpi statistics, float32 for lerobot's, as in the originals.
    """

    mode: Mode
    offset: FloatArray
    divisor: FloatArray
    multiplier: FloatArray

    @classmethod
    def zscore(
        cls, mean: ArrayLike, std: ArrayLike, flavour: Flavour = "openpi", eps: float | None = None
    ) -> Normalizer:
        """Mean 0, standard deviation 1. openpi adds 1e-6 in both directions, lerobot 1e-8 in the forward one only."""
        offset, spread = _statistics(flavour, mean=mean, std=std)
        if (spread < 0).any():
            raise ValueError(f"std is negative at dimension {int(np.argmax(spread < 0))}, expected values >= 0")
        divisor = spread + spread.dtype.type(_eps(flavour, eps))
        return cls("zscore", offset, divisor, divisor if flavour == "openpi" else spread)

    @classmethod
    def quantile(
        cls, low: ArrayLike, high: ArrayLike, flavour: Flavour = "openpi", eps: float | None = None
    ) -> Normalizer:
        """The 1 % and 99 % quantiles go to -1 and 1. openpi adds 1e-6 to the range, lerobot only mends a range of 0."""
        return cls._between("quantile", low, high, flavour, eps)

    @classmethod
    def minmax(cls, low: ArrayLike, high: ArrayLike, eps: float | None = None) -> Normalizer:
        """Minimum and maximum go to -1 and 1 (lerobot only)."""
        return cls._between("minmax", low, high, "lerobot", eps)

    @classmethod
    def identity(cls) -> Normalizer:
        """No statistics: every dimension is an extra one and passes through."""
        empty = np.zeros(0)
        return cls("identity", empty, empty, empty)

    @classmethod
    def _between(cls, mode: Mode, low: ArrayLike, high: ArrayLike, flavour: Flavour, eps: float | None) -> Normalizer:
        offset, top = _statistics(flavour, low=low, high=high)
        spread = top - offset
        if (spread < 0).any():
            index = int(np.argmax(spread < 0))
            raise ValueError(f"{mode}: low is {offset[index]} and high {top[index]} at dimension {index}, expected <=")
        small = spread.dtype.type(_eps(flavour, eps))
        divisor = spread + small if flavour == "openpi" else np.where(spread == 0, small, spread)
        return cls(mode, offset, divisor, divisor)

    @property
    def dims(self) -> int:
        """Dimensions the statistics cover."""
        return int(self.offset.shape[0])

    def normalize(self, x: ArrayLike) -> FloatArray:
        """Robot units -> model units; x is [..., D], the result a new float array of the same shape."""
        out, used = self._copy(x)
        part = (out[..., :used] - self.offset[:used]) / self.divisor[:used]
        out[..., :used] = part if self.mode == "zscore" else part * 2 - 1
        return out

    def unnormalize(self, y: ArrayLike) -> FloatArray:
        """Model units -> robot units; y is [..., D], the result a new float array of the same shape."""
        out, used = self._copy(y)
        part = out[..., :used] if self.mode == "zscore" else (out[..., :used] + 1) / 2
        out[..., :used] = part * self.multiplier[:used] + self.offset[:used]
        return out

    def _copy(self, x: ArrayLike) -> tuple[FloatArray, int]:
        out = np.array(x, dtype=self.offset.dtype)
        if out.ndim == 0:
            raise ValueError("cannot normalise a scalar, expected an array [..., D]")
        return out, min(self.dims, out.shape[-1])


@dataclass(frozen=True, eq=False)
class NormStats:
    """The two normalisers of a checkpoint.

    Attributes:
        state: for the robot's state (after the robot's own maps, before zero padding).
        actions: for actions (after delta actions are made).
        source: where they came from, for messages.
        delta_mask: which action dimensions the checkpoint says are relative to the state: lerobot's newer
            processor files say it (all False where the step is switched off); None means nothing is said.
    """

    state: Normalizer
    actions: Normalizer
    source: str
    delta_mask: tuple[bool, ...] | None = None

    @classmethod
    def identity(cls) -> NormStats:
        """No normalisation. Only ever on request: a trained checkpoint without its statistics moves a robot wrongly."""
        return cls(Normalizer.identity(), Normalizer.identity(), "identity, on request")


def build_with_context(context: str, build: Any, *values: Any, **options: Any) -> Normalizer:
    """``build(*values, **options)``, its ValueError prefixed with where the values came from."""
    try:
        result: Normalizer = build(*values, **options)
    except ValueError as error:
        raise ValueError(f"{context}: {error}") from error
    return result


def _statistics(flavour: Flavour, **values: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two vectors of one length, finite, in the flavour's dtype."""
    dtype = np.dtype(np.float32 if flavour == "lerobot" else np.float64)
    vectors: list[FloatArray] = []
    for name, value in values.items():
        try:
            vector = np.array(value, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is not a list of numbers") from error
        if vector.ndim != 1 or vector.size == 0:
            raise ValueError(f"{name} has shape {list(vector.shape)}, expected [D] with D >= 1")
        if not np.isfinite(vector).all():
            index = int(np.argmin(np.isfinite(vector)))
            raise ValueError(f"{name} is {vector[index]} at dimension {index}, expected finite numbers")
        vectors.append(vector)
    (first_name, second_name), (first, second) = values, vectors
    if first.shape != second.shape:
        raise ValueError(f"{first_name} has {first.size} dimensions and {second_name} {second.size}, expected equal")
    return first, second


def _eps(flavour: Flavour, eps: float | None) -> float:
    if eps is None:
        return _OPENPI_EPS if flavour == "openpi" else _LEROBOT_EPS
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number >= 0")
    return eps

"""The residual stream between layers, with what the norm in front of the next linear layer needs of it.

Whoever writes the stream has its rows in registers, so it leaves behind what the next layer would otherwise compute in
every one of its tiles: a rounded copy to multiply, and the sums from which the norm's factor of each row follows. A
linear layer behind a norm is then a plain matrix product with a factor per row in its epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Columns that are summed together; a writer's tile spans a multiple of it.
SUM_COLUMNS = 64


def sum_blocks(width: int) -> int:
    """Partial sums per row of a stream of that width."""
    return -(-width // SUM_COLUMNS)


@dataclass(frozen=True)
class Stream:
    """Rows of the residual stream.

    Attributes:
        x: float32 [rows, W], the stream itself.
        rounded: engine dtype [rows, W], x times the next norm's adaRMS scale (x itself where there is none).
        square_sums: float32 [rows, blocks], sum of x^2 over each 64 columns.
        sums: float32 [rows, blocks], sum of x over each 64 columns; None where the norm subtracts no mean.
    """

    x: Tensor
    rounded: Tensor
    square_sums: Tensor
    sums: Tensor | None = None

    def __getitem__(self, rows: slice) -> Stream:
        sums = None if self.sums is None else self.sums[rows]
        return Stream(self.x[rows], self.rounded[rows], self.square_sums[rows], sums)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, by name."""
        named = {"x": self.x, "rounded": self.rounded, "square_sums": self.square_sums, "sums": self.sums}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def write(self, x: Tensor, next_scale: Tensor | None) -> None:
        """Replace the rows by ``x`` [rows, W]; ``next_scale`` float32 [W] or [rows, W] is the next norm's, or None."""
        self.x.copy_(x)
        self.rounded.copy_(self.x if next_scale is None else self.x * next_scale)
        self.square_sums.copy_(_block_sums(self.x.square()))
        if self.sums is not None:
            self.sums.copy_(_block_sums(self.x))


def of_rows(terms: Tensor | None, time_index: Tensor | None) -> Tensor | None:
    """adaRMS's ``terms``: [N] for all rows as they are, or of a table [2, N] the row that each index names: [rows, N].

    ``time_index`` int32 [rows] is 0 for tokens at the flow step's time and 1 for those at time 0, or None.
    """
    return terms if terms is None or time_index is None else terms[time_index]


def _block_sums(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return F.pad(x, (0, sum_blocks(width) * SUM_COLUMNS - width)).unflatten(-1, (-1, SUM_COLUMNS)).sum(-1)


@dataclass(frozen=True)
class Scratch:
    """Working memory of kernels that share one tile among several programs; the torch meanings need none.

    Attributes:
        partials: float32 [n], parts of results that wait to be added up.
        counters: int32 [m], how many parts have arrived; zero between launches.
        barrier: int32 [2], how many programs have reached and left a barrier; zero between launches.
    """

    partials: Tensor
    counters: Tensor
    barrier: Tensor

    #: 32 MiB: two partial tiles of 128 x 128 for each multiprocessor of the largest GPU are 22 MiB.
    PARTIALS = 8 << 20
    COUNTERS = 1 << 14

    @classmethod
    def allocate(cls, device: torch.device, *, needed: bool) -> Scratch:
        """On the device, empty where no kernel asks for it."""
        partials, counters = (cls.PARTIALS, cls.COUNTERS) if needed else (0, 0)
        return cls(
            torch.empty(partials, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
        )

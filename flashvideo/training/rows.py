"""Which rows of a batch a process learns from: all of them in one process, a part where several train together.

Every random number is drawn for the whole batch, and each process takes those of its rows: so the numbers don't depend
on how many processes there are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

PerRow = TypeVar("PerRow", Tensor, list)


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `end` - 1 of batch `index`, which has `count`."""

    index: int
    first: int
    end: int
    count: int

    @classmethod
    def whole(cls, index: int, count: int) -> Rows:
        """All rows of a batch."""
        return cls(index, 0, count, count)

    def __len__(self) -> int:
        """Count the rows."""
        return self.end - self.first

    @property
    def share(self) -> float:
        """Their share of the batch."""
        return len(self) / self.count

    def of(self, values: PerRow) -> PerRow:
        """The values of these rows, from those of the whole batch [count, ...]."""
        return values[self.first : self.end]

    def normal_like(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise of the shape of x, which has these rows; drawn on the CPU for the whole batch."""
        return self.of(torch.randn((self.count, *x.shape[1:]), generator=generator)).to(x)


def rows_of_step(step: int, accumulate: int, count: Callable[[int], int], rank: int = 0, size: int = 1) -> list[Rows]:
    """The rows of a step's `accumulate` batches that process `rank` of `size` learns from; `count(i)` are batch i's.

    Neighbouring ones, and as many for each process as it goes; without rows, a batch is left out.
    """
    found = []
    for part in range(accumulate):
        index = step * accumulate + part
        whole = count(index)
        places = (whole * accumulate * place // size - whole * part for place in (rank, rank + 1))
        first, end = (min(max(place, 0), whole) for place in places)
        if first < end:
            found.append(Rows(index, first, end, whole))
    return found


class Batches(Dataset):
    """Batches of training, each a tensor or a dict of tensors on the CPU; worker processes may make them."""

    @abstractmethod
    def count(self, index: int) -> int:
        """How many rows batch `index` has."""

    @abstractmethod
    def part(self, rows: Rows) -> Any:
        """Make rows of a batch; no others are read or drawn."""

    def __getitem__(self, index: int | Rows) -> Any:
        """Batch `index`, or rows of it."""
        return self.part(index if isinstance(index, Rows) else Rows.whole(index, self.count(index)))

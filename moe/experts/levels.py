"""Divides the rows of experts with unequal numbers of rows into batches with equal numbers.

Shapes: E experts, K experts of a level (all, or one), P rows of each, S = E * P slots of the first level, N rows in the
experts' order, D channels.

All experts are in the first level, each with up to P rows. Further rows of an expert form a separate level: nothing is
dropped, and one expert with many rows does not make all others compute zeros.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FEWEST_ROWS = 16
COST_OF_A_LEVEL = 64
"""Overhead of a level of one expert, as a number of rows: its matrices are read again."""


class Level(ABC):
    """A batch of experts with equal numbers of rows, some of which are empty.

    Attributes:
        size: K.
        rows: P.
    """

    size: int
    rows: int

    @abstractmethod
    def of(self, bank: Tensor) -> Tensor:
        """The level's experts of ``[E, ...]``, ``[K, ...]``."""

    @abstractmethod
    def fill(self, rows_ND: Tensor, *, zeros: bool) -> Tensor:
        """The level's rows ``[K, P, D]``. The empty ones are zeros with ``zeros``, else any finite values."""

    @abstractmethod
    def put(self, out_ND: Tensor, made_KPD: Tensor) -> None:
        """Writes ``[K, P, D]`` to the positions of its rows. The level of all experts is first and writes all rows."""

    @abstractmethod
    def give(self, gradient: Tensor, left: Tensor, right: Tensor) -> None:
        """Writes a batched product into a gradient ``[E, ...]``, or adds it to what the level of all experts wrote."""

    @abstractmethod
    def add(self, gradient: Tensor, values: Tensor) -> None:
        """Writes or adds ``[K, ...]`` likewise."""


@dataclass(frozen=True)
class AllExperts(Level):
    """The first level. Rows are moved by one gather each way.

    Attributes:
        size: E.
        rows: P.
        source_S: int64 ``[E * P]``, the row of each slot; any row for a slot that is empty.
        empty_S: int64, the slots that are empty.
        slot_N: int64 ``[N]``, the slot of each row; any slot for a row of another level or of no expert.
    """

    size: int
    rows: int
    source_S: Tensor
    empty_S: Tensor
    slot_N: Tensor

    @classmethod
    def of_counts(cls, count_E: NDArray[np.int64], rows: int, num_rows: int) -> Self:
        """The first ``rows`` rows of each expert, of ``num_rows`` in all."""
        start_E, inside_P = np.cumsum(count_E) - count_E, np.arange(rows)
        held_EP = inside_P < np.minimum(count_E, rows)[:, None]
        source_EP = np.where(held_EP, start_E[:, None] + inside_P, 0)
        slot_N = np.zeros(num_rows, dtype=np.int64)
        slot_N[source_EP[held_EP]] = np.flatnonzero(held_EP)
        arrays = source_EP.ravel(), np.flatnonzero(~held_EP), slot_N
        return cls(len(count_E), rows, *map(torch.from_numpy, arrays))

    def of(self, bank: Tensor) -> Tensor:
        """The bank."""
        return bank

    def fill(self, rows_ND: Tensor, *, zeros: bool) -> Tensor:
        """Gathers the slots."""
        filled_SD = rows_ND.index_select(0, self.source_S)
        if zeros:
            filled_SD.index_fill_(0, self.empty_S, 0)
        return filled_SD.view(self.size, self.rows, -1)

    def put(self, out_ND: Tensor, made_KPD: Tensor) -> None:
        """Gathers the rows."""
        torch.index_select(made_KPD.flatten(0, 1), 0, self.slot_N, out=out_ND)

    def give(self, gradient: Tensor, left: Tensor, right: Tensor) -> None:
        """Writes."""
        if gradient.dtype == left.dtype:
            torch.bmm(left, right, out=gradient)
        else:
            gradient.copy_(torch.bmm(left, right))

    def add(self, gradient: Tensor, values: Tensor) -> None:
        """Writes."""
        gradient.copy_(values)


@dataclass(frozen=True)
class OneExpert(Level):
    """The rows of one expert that are not in the first level. They are contiguous.

    Attributes:
        expert: Its number.
        first: Its first row here.
        last: Index after its last row.
        rows: P.
        size: 1.
    """

    expert: int
    first: int
    last: int
    rows: int
    size: int = 1

    def of(self, bank: Tensor) -> Tensor:
        """The expert."""
        return bank[self.expert : self.expert + 1]

    def fill(self, rows_ND: Tensor, *, zeros: bool) -> Tensor:
        """Copies the rows; the empty ones are always zeros, since there are few."""
        filled_PD = F.pad(rows_ND[self.first : self.last], (0, 0, 0, self.rows - (self.last - self.first)))
        return filled_PD[None]

    def put(self, out_ND: Tensor, made_KPD: Tensor) -> None:
        """Copies them back."""
        out_ND[self.first : self.last] = made_KPD[0, : self.last - self.first]

    def give(self, gradient: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds."""
        own = self.of(gradient)
        if own.dtype == left.dtype:
            own.baddbmm_(left, right)
        else:
            own += torch.bmm(left, right)

    def add(self, gradient: Tensor, values: Tensor) -> None:
        """Adds."""
        own = self.of(gradient)
        own += values


def plan_levels(counts: Sequence[int], num_rows: int) -> list[Level]:
    """Divides the rows of experts into levels, that of all experts first; none if no expert has a row.

    Args:
        counts: Rows of each expert.
        num_rows: N; rows after the last expert's belong to no expert.
    """
    count_E = np.asarray(counts, dtype=np.int64)
    return list(_levels(count_E, num_rows)) if count_E.any() else []


def _levels(count_E: NDArray[np.int64], num_rows: int) -> Iterator[Level]:
    end_E, rows = np.cumsum(count_E), _rows_of_all(count_E)
    yield AllExperts.of_counts(count_E, rows, num_rows)
    for expert in np.flatnonzero(count_E > rows).tolist():
        last, beyond = int(end_E[expert]), int(count_E[expert]) - rows
        yield OneExpert(expert, last - beyond, last, padded_rows(beyond))


def _rows_of_all(count_E: NDArray[np.int64]) -> int:
    """The number of rows of the first level that minimises the cost of empty rows and further levels."""
    choice_C = np.array(sorted({padded_rows(int(count)) for count in count_E if count > 0}))
    beyond_CE = np.maximum(count_E[None, :] - choice_C[:, None], 0)
    cost_C = choice_C * len(count_E) + beyond_CE.sum(1) + COST_OF_A_LEVEL * (beyond_CE > 0).sum(1)
    return int(choice_C[cost_C.argmin()])


def padded_rows(rows: int) -> int:
    """``rows`` rounded up to one of at most eight numbers between two powers of two; at least 16."""
    step = max(FEWEST_ROWS, 1 << max(0, (rows - 1).bit_length() - 4))
    return max(FEWEST_ROWS, -(-rows // step) * step)

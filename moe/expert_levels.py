"""How rows of unequal experts are cut into batches of equal ones.

Shapes: E experts, K experts of a level (all, or one), P rows of each, N rows in the experts' order, D channels.

All experts take part in the first level, each with up to P rows. What an expert has beyond them is a level of its own:
nothing is dropped, and one crowded expert does not make all others compute zeros.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FEWEST_ROWS = 16
COST_OF_A_LEVEL = 64
"""What a level of one expert costs beside its rows, in rows: its matrices are read again."""


@dataclass(frozen=True)
class Level:
    """A batch of experts with equally many rows, some of which may be empty.

    Attributes:
        expert: The only expert of the level; None for all experts in their order.
        size: K.
        rows: P.
        source_n: int64 ``[n]``, the rows of ``[N, D]`` that belong to the level.
        slot_n: int64 ``[n]``, their places among the K * P rows of the level.
    """

    expert: int | None
    size: int
    rows: int
    source_n: Tensor
    slot_n: Tensor

    def of(self, bank: Tensor) -> Tensor:
        """The level's experts of ``[E, ...]``, ``[K, ...]``."""
        return bank if self.expert is None else bank[self.expert : self.expert + 1]

    def fill(self, rows_ND: Tensor) -> Tensor:
        """The level's rows ``[K, P, D]``, zero where an expert has fewer."""
        filled = rows_ND.new_zeros(self.size * self.rows, rows_ND.shape[1])
        return filled.index_copy_(0, self.slot_n, rows_ND.index_select(0, self.source_n)).view(self.size, self.rows, -1)

    def put(self, out_ND: Tensor, made_KPD: Tensor) -> None:
        """Writes ``[K, P, D]`` back to where the rows came from."""
        out_ND.index_copy_(0, self.source_n, made_KPD.flatten(0, 1).index_select(0, self.slot_n))

    def give(self, gradient: Tensor, left: Tensor, right: Tensor) -> None:
        """Writes the batched product into a gradient ``[E, ...]``; levels of one expert add to it."""
        own = self.of(gradient)
        if own.dtype != left.dtype:
            self.add(gradient, torch.bmm(left, right))
        elif self.expert is None:
            torch.bmm(left, right, out=own)
        else:
            own.baddbmm_(left, right)

    def add(self, gradient: Tensor, values: Tensor) -> None:
        """Writes into a gradient; levels of one expert add to it."""
        own = self.of(gradient)
        if self.expert is None:
            own.copy_(values)
        else:
            own += values


def plan_levels(counts: Sequence[int]) -> list[Level]:
    """Cuts the rows of experts, ``counts`` of each, into levels, that of all experts first; none without a row."""
    count_E = np.asarray(counts, dtype=np.int64)
    return list(_levels(count_E)) if count_E.any() else []


def _levels(count_E: NDArray[np.int64]) -> Iterator[Level]:
    start_E, rows = np.cumsum(count_E) - count_E, _rows_of_all(count_E)
    here_E = np.minimum(count_E, rows)
    inside_n = np.arange(here_E.sum()) - np.repeat(np.cumsum(here_E) - here_E, here_E)
    source_n = inside_n + np.repeat(start_E, here_E)
    slot_n = inside_n + np.repeat(np.arange(len(count_E)) * rows, here_E)
    yield Level(None, len(count_E), rows, torch.from_numpy(source_n), torch.from_numpy(slot_n))
    for expert in np.flatnonzero(count_E > rows).tolist():
        first, last = int(start_E[expert]) + rows, int(start_E[expert] + count_E[expert])
        yield Level(expert, 1, padded_rows(last - first), torch.arange(first, last), torch.arange(last - first))


def _rows_of_all(count_E: NDArray[np.int64]) -> int:
    """The number of rows at which computing zeros and putting rows off cost least together."""
    choice_C = np.array(sorted({padded_rows(int(count)) for count in count_E if count > 0}))
    beyond_CE = np.maximum(count_E[None, :] - choice_C[:, None], 0)
    cost_C = choice_C * len(count_E) + beyond_CE.sum(1) + COST_OF_A_LEVEL * (beyond_CE > 0).sum(1)
    return int(choice_C[cost_C.argmin()])


def padded_rows(rows: int) -> int:
    """``rows`` rounded up so that no more than eight numbers lie between two powers of two; at least 16."""
    step = max(FEWEST_ROWS, 1 << max(0, (rows - 1).bit_length() - 4))
    return max(FEWEST_ROWS, -(-rows // step) * step)

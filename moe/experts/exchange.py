"""The interface by which a split bank of experts exchanges rows with other processes, without knowing of ranks.

Shapes: P parts, one on each process of an expert-parallel group; E experts in all, E / P of each part.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class ExpertExchange(Protocol):
    """Exchanges rows between the parts. Every part calls every method, in the same order."""

    @property
    def parts(self) -> int:
        """P."""

    @property
    def part(self) -> int:
        """The index of this process' part."""

    def trade_counts(self, counts_PE: Tensor) -> Tensor:
        """Sends row p, int64 ``[E / P]``, to part p. Returns what all parts sent here, ``[P, E / P]``."""

    def start_rows(self, rows_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Begins to send the first ``sent[0]`` rows to part 0, the next ``sent[1]`` to part 1 and so on.

        Returns:
            Waits for the received rows and returns them, ``received[p]`` of part p, parts in their order. It is called
            once. Gradients are sent back in the same way.
        """

    def join(self, tensor: Tensor) -> Tensor:
        """Concatenates ``[E / P, ...]`` of all parts to ``[E, ...]``, without a gradient."""

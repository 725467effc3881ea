"""Steps of the matrices that Muon moves: how many a process works on, their operations, and their bytes.

The operations are counted while the engine's own function runs on ``meta``.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.estimate.operations import Operation, OperationCounter, Operations
from engine.step.muon import MuonConfig, matrices_in, orthogonalised, owners, product_cost, shapes_in, together
from engine.step.whole import whole_shape
from moe.sparse import served_shares
from moe.stacked import Stacked

MOVED_BYTES, COPIED_BYTES, COPIED_BYTES_SHARDED = 32, 64, 88
"""Bytes read and written per element beside the products: in place by momentum, decay and step; in copies by the
look-ahead, the scale and from owners, and where replicas hold runs also to owners. A test counts them in a step."""


@dataclass(frozen=True)
class Matrices:
    """The matrices of one parameter.

    Attributes:
        rows: n.
        columns: m.
        count: How many.
        in_bank: Whether they belong to a bank of experts, which can be split over processes.
    """

    rows: int
    columns: int
    count: int
    in_bank: bool = False

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.count * self.rows * self.columns

    def held(self, expert_parallel: int) -> float:
        """Elements of which a process holds something, where banks are split over so many processes."""
        return self.elements / (expert_parallel if self.in_bank else 1)


def layer_matrices(layer: nn.Module, moved: Collection[int]) -> tuple[Matrices, ...]:
    """Those of a layer, from the ids of the parameters that Muon moves."""
    stacked, banks = matrices_in(layer), served_shares(layer)
    return tuple(
        Matrices(*shapes_in(whole_shape(one), stacked.get(id(one), Stacked())), in_bank=id(one) in banks)
        for one in layer.parameters()
        if id(one) in moved
    )


def worked_on(matrices: Iterable[Matrices], *, owning: int, expert_parallel: int) -> Mapping[tuple[int, int], int]:
    """How many matrices of each shape the process works on that has most to do.

    Args:
        matrices: Of the layers that it trains.
        owning: Replicas that divide the matrices among themselves; 1 where each works on all.
        expert_parallel: Processes over which banks are split.
    """
    found: Counter[tuple[int, int]] = Counter()
    for in_bank, parts in ((False, 1), (True, expert_parallel)):
        shapes = [
            (one.rows, one.columns) for one in matrices_of(matrices, in_bank=in_bank) for _ in range(one.count // parts)
        ]
        costs = [product_cost(*shape) for shape in shapes]
        replicas = max(1, owning // parts)
        work = [0] * replicas
        placed = owners(costs, replicas)
        for owner, cost in zip(placed, costs, strict=True):
            work[owner] += cost
        busiest = work.index(max(work))
        found.update(shape for shape, owner in zip(shapes, placed, strict=True) if owner == busiest)
    return found


def matrices_of(matrices: Iterable[Matrices], *, in_bank: bool) -> list[Matrices]:
    """Those that belong to banks, or the others."""
    return [one for one in matrices if one.in_bank is in_bank]


def muon_operations(config: MuonConfig, counts: Mapping[tuple[int, int], int]) -> Operations:
    """Operations that make matrices orthogonal: of each iteration three products with the smaller side.

    Args:
        config: Iterations and precision; see ``MuonConfig.settled``.
        counts: Matrices by shape.
    """
    total: Counter[Operation] = Counter()
    dtype = config.dtype
    for (rows, columns), count in counts.items():
        most = together(rows, columns)
        for batch, times in ((min(count, most), count // min(count, most)), (count % most if count > most else 0, 1)):
            if batch:
                with OperationCounter() as counter:
                    orthogonalised(torch.empty(batch, rows, columns, dtype=dtype, device="meta"), config.iterations)
                for operation, found in counter.found.items():
                    total[operation] += found * times
    return total

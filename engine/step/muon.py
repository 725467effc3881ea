"""Muon: steps of momentum, made orthogonal, for the matrices of blocks.

The step of a matrix is the nearest matrix with orthonormal rows or columns to its momentum: every direction moves
equally far, also those whose gradients are small. It needs whole matrices. Each matrix has one owner among the
replicas, which works on it and sends the step to the others. Where a host shards them, all send the owner their runs of
the momentum first, and get back their runs of the step: two all-to-alls of the share of each replica. Where every
replica holds everything, only steps are sent.

Shapes: P replicas, N elements of a flat tensor that a host moves as one, M matrices in it.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.processes.collectives import all_gather_rows, trade_rows
from engine.step.whole import whole_shape
from moe.ranges import Range
from moe.stacked import Stacked
from omnivl.chain.modules import HasStacked

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TOGETHER = 1 << 22
"""Elements of matrices of one shape that are multiplied in one batch."""

_TOGETHER_ON_CPU = 1 << 18
"""The same on a CPU: larger batches leave its cache. Measured with matrices of 128 to 768 rows."""

_MOVED_TOGETHER = 1 << 27
"""Elements at most of parameters whose steps are made together where every replica holds everything: the step has
copies of them."""

STEP_COPIES = 4
"""Copies of what is moved together, fp32, that its step holds at most, beside those of the matrices that are multiplied
at the moment; one fewer where there is one replica. A test counts them."""


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of blocks. Everything else is moved by AdamW.

    Muon moves the weights of two or more dimensions in the blocks of stacks: attention, dense layers and experts.
    Queries, keys and values that lie in one weight, and the experts of a bank, are made orthogonal each for itself.
    AdamW moves what stands outside of stacks (embeddings, projections, heads), routers, gates of attributes, tokens and
    tables that are not decayed, biases and norms. A checkpoint has one moment (``exp_avg``) of what Muon moves.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); for ``scale: rms`` and
    weight decay J. Liu et al., Muon is scalable for LLM training (arXiv 2502.16982), equation 4.

    Attributes:
        lr: Peak learning rate of these matrices. It follows the schedule of the others.
        momentum: Decay of the running mean of the gradient.
        nesterov: Whether the step looks ahead by one step of momentum.
        iterations: Newton-Schulz iterations.
        weight_decay: Decoupled weight decay of these matrices.
        scale: Factor on the step of a matrix of n rows (outputs) and m columns (inputs). ``shape``:
            sqrt(max(1, n / m)). ``rms``: 0.2 sqrt(max(n, m)), so that elements move as far as AdamW's do; ``lr`` is
            then of the size of AdamW's.
        precision: Type of the products. ``auto``: that of the model's own products, ``parallel.precision``.
    """

    lr: Annotated[float, Range(above=0, high=100)] = 0.02
    momentum: Annotated[float, Range(0, below=1)] = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Range(1, 100)] = 5
    weight_decay: Annotated[float, Range(0)] = 0.0
    scale: Literal["shape", "rms"] = "shape"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def factor(self, rows: int, columns: int) -> float:
        """The factor on the step of a matrix."""
        if self.scale == "rms":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the products; fp32 where an ``auto`` has not been settled."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def settled(self, precision: Literal["auto", "fp32", "bf16"]) -> Self:
        """The same with a type in place of ``auto``."""
        return replace(self, precision=precision) if self.precision == "auto" else self


def orthogonalised(matrices: Tensor, iterations: int) -> Tensor:
    """Brings the singular values of matrices ``[..., n, m]`` near 1; same shape and type.

    Five iterations take singular values from 1e-3 of the Frobenius norm on to between 0.7 and 1.2.

    Source: K. Jordan et al. (2024): quintic Newton-Schulz iteration, coefficients 3.4445, -4.7750, 2.0315.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    made = x.view(shape)
    return made.mT if tall else made


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a flat tensor.

    Attributes:
        rows: n, as it is stored.
        columns: m.
        factor: Of its step.
    """

    rows: int
    columns: int
    factor: float

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Placed:
    """Where a replica holds its run of a parameter, or of a matrix.

    Attributes:
        offset: Of the run in the flat tensor.
        start: Of the run in the parameter or matrix.
        count: Its elements; 0 where it holds nothing.
    """

    offset: int
    start: int
    count: int


class MatrixSteps:
    """Steps of the matrices that lie in one flat tensor, of which this replica holds runs."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        placed: Sequence[Placed],
        stacked: Mapping[int, Stacked],
        config: MuonConfig,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        repeated: bool = False,
    ) -> None:
        """Learns what the others hold, and divides the matrices among the replicas. Called by every replica.

        Args:
            parameters: Those in the flat tensor, in an order that is the same on every replica.
            placed: Where this replica has each of them.
            stacked: By the ids of parameters, how matrices lie in them; see ``matrices_in``.
            config: Iterations, scale, precision.
            group: The replicas that hold the rest, or the same; None where there is only this one.
            device: Where matrices are multiplied.
            repeated: Whether every replica of the group holds everything, with the same momentum.
        """
        self._config, self._group, self._device = config, group, device
        self._dtype = config.dtype
        self._repeated = repeated or group is None
        places, me = _places_of_all(placed, group, device, repeated=repeated)
        self._matrices: list[_Matrix] = []
        held: list[list[Placed]] = [[] for _ in places]  # [P][M]
        for index, parameter in enumerate(parameters):
            for matrix, begin in _matrices_of(whole_shape(parameter), stacked.get(id(parameter), Stacked()), config):
                self._matrices.append(matrix)
                for replica, own in enumerate(places):
                    held[replica].append(_overlap(own[index], begin, begin + matrix.numel))
        owned = owners([product_cost(one.rows, one.columns) for one in self._matrices], len(places))
        self._owned = [index for index, owner in enumerate(owned) if owner == me]
        self._whole = {index: held[me][index] for index in self._owned} if self._repeated else {}
        mine = [(owner, run) for owner, run in zip(owned, held[me], strict=True) if run.count > 0]
        self._own = sorted(mine, key=lambda pair: pair[0])
        self._own_counts = _totals(self._own, len(places))
        theirs = [(replica, index, own[index]) for replica, own in enumerate(held) for index in self._owned]
        self._theirs = [one for one in theirs if one[2].count > 0]
        self._their_counts = _totals([(replica, run) for replica, _, run in self._theirs], len(places))

    def step(self, momentum: Tensor) -> Tensor:
        """The step ``[N]`` of this replica's runs, fp32, from its runs of the momentum; 0 where no matrix is."""
        flat = momentum.to(self._device)
        made = self._orthogonal(self._owned_momentum(flat))
        outgoing = _joined([made[index][run.start : run.start + run.count] for _, index, run in self._theirs], flat)
        del made
        returned = self._traded(outgoing, self._their_counts, self._own_counts)
        step = torch.zeros_like(flat)
        for (_, run), values in zip(self._own, _cut(returned, self._own), strict=True):
            step[run.offset : run.offset + run.count] = values
        return step.to(momentum.device)

    def _owned_momentum(self, flat: Tensor) -> dict[int, Tensor]:
        """The momentum of each owned matrix, flat."""
        if self._repeated:
            return {index: flat[run.offset : run.offset + run.count] for index, run in self._whole.items()}
        whole = {index: flat.new_empty(self._matrices[index].numel) for index in self._owned}
        outgoing = _joined([flat[run.offset : run.offset + run.count] for _, run in self._own], flat)
        arrived = self._traded(outgoing, self._own_counts, self._their_counts)
        for (_, index, run), values in zip(self._theirs, _cut(arrived, self._theirs), strict=True):
            whole[index][run.start : run.start + run.count] = values
        return whole

    def _traded(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return rows if self._group is None else trade_rows(rows, sent, received, self._group)

    def _orthogonal(self, whole: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The scaled step of each owned matrix, flat; those of one shape are multiplied together."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index in whole:
            matrix = self._matrices[index]
            by_shape.setdefault((matrix.rows, matrix.columns), []).append(index)
        made: dict[int, Tensor] = {}
        for (rows, columns), indices in by_shape.items():
            most = together(rows, columns, self._device.type)
            for begin in range(0, len(indices), most):
                chosen = indices[begin : begin + most]
                stack = torch.stack([whole[index].view(rows, columns) for index in chosen]).to(self._dtype)
                steps = orthogonalised(stack, self._config.iterations).float()
                made |= {i: (one * self._matrices[i].factor).flatten() for i, one in zip(chosen, steps, strict=True)}
        return made


def matrices_in(module: nn.Module) -> dict[int, Stacked]:
    """By the ids of its parameters, how matrices lie in those of a module whose shape does not say it."""
    return {
        id(parameter): stacked
        for part in module.modules()
        if isinstance(part, HasStacked)
        for parameter, stacked in part.stacked()
    }


def shapes_in(shape: Sequence[int], stacked: Stacked) -> tuple[int, int, int]:
    """Rows and columns of the matrices in a parameter ``[..., count * n, m]``, and how many they are."""
    *leading, rows, columns = shape
    return rows // stacked.count, columns, math.prod(leading) * stacked.count


def together(rows: int, columns: int, device: str = "cuda") -> int:
    """How many matrices of a shape are multiplied in one batch, on a type of device."""
    return max(1, (_TOGETHER_ON_CPU if device == "cpu" else _TOGETHER) // (rows * columns))


def moved_together(replicas: int) -> int:
    """Elements at most of parameters whose steps are made together where so many replicas hold everything.

    A parameter that has more is moved alone. Each replica has a batch to multiply, so that their work is even.
    """
    return min(_TOGETHER * replicas, _MOVED_TOGETHER)


def product_cost(rows: int, columns: int) -> int:
    """What the products of a matrix cost, relative to those of others."""
    return min(rows, columns) * rows * columns


def owners(costs: Sequence[int], replicas: int) -> list[int]:
    """The owner of each matrix: the most expensive ones first, each to whoever has least to do."""
    work, found = [(0, replica) for replica in range(replicas)], [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        done, owner = heapq.heappop(work)
        found[index] = owner
        heapq.heappush(work, (done + costs[index], owner))
    return found


@torch.no_grad()
def move_matrices(
    group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Tensor]], steps: Mapping[int, Any]
) -> None:
    """One step of a group of an optimizer whose tensors hold matrices.

    Args:
        group: ``params``, ``lr``, ``weight_decay`` and ``muon``, a ``MuonConfig``.
        state: The optimizer's; ``exp_avg`` has the momentum.
        steps: By the ids of the tensors, their ``MatrixSteps``. Tensors that share one lie in it in their order. Those
            of them that have no gradient count as if it were zero; where none has one, nothing is moved.
    """
    config = cast("MuonConfig", group["muon"])
    sharing: dict[int, list[Tensor]] = {}
    for tensor in group["params"]:
        sharing.setdefault(id(steps[id(tensor)]), []).append(tensor)
    for tensors in sharing.values():
        if all(tensor.grad is None for tensor in tensors):
            continue
        ahead = _ahead(tensors, state, config)
        step = steps[id(tensors[0])].step(ahead)
        del ahead
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
        runs = torch.split(step, [tensor.numel() for tensor in tensors])
        moves = [run.view(tensor.shape) for run, tensor in zip(runs, tensors, strict=True)]
        torch._foreach_add_(tensors, moves, alpha=-group["lr"])


def _ahead(tensors: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]], config: MuonConfig) -> Tensor:
    """Takes the gradients of tensors into their momentum; what is made orthogonal, ``[N]`` of all of them."""
    for tensor in tensors:
        own = state[tensor]
        if "exp_avg" not in own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            own["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        own["step"] += 1
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    momenta = [state[tensor]["exp_avg"] for tensor in tensors]
    torch._foreach_lerp_(momenta, gradients, 1 - config.momentum)
    made = torch._foreach_lerp(gradients, momenta, config.momentum) if config.nesterov else momenta
    return _joined([one.reshape(-1) for one in made], made[0])


def _matrices_of(shape: Sequence[int], stacked: Stacked, config: MuonConfig) -> Iterable[tuple[_Matrix, int]]:
    """The matrices of a parameter ``[..., n, m]``, each with its begin in it."""
    if len(shape) < 2 or stacked.count == 0:  # a filler of a pipeline stage
        return []
    rows, columns, count = shapes_in(shape, stacked)
    outputs, inputs = (columns, rows) if stacked.transposed else (rows, columns)
    matrix = _Matrix(rows, columns, config.factor(outputs, inputs))
    return [(matrix, index * matrix.numel) for index in range(count)]


def _places_of_all(
    placed: Sequence[Placed], group: dist.ProcessGroup | None, device: torch.device, *, repeated: bool
) -> tuple[list[list[Placed]], int]:
    """Where every replica has each parameter, and this replica's number."""
    if group is None:
        return [list(placed)], 0
    if repeated:
        return [list(placed)] * dist.get_world_size(group), dist.get_rank(group)
    numbers = [[one.offset, one.start, one.count] for one in placed]
    own = torch.tensor(numbers, dtype=torch.int64, device=device).view(-1, 3)
    everyone = own.new_empty((dist.get_world_size(group) * len(placed), 3))
    all_gather_rows(everyone, own, group=group)
    replicas = everyone.view(-1, len(placed), 3).tolist()
    return [[Placed(*place) for place in replica] for replica in replicas], dist.get_rank(group)


def _overlap(placed: Placed, begin: int, end: int) -> Placed:
    """The part of a run that lies in elements ``begin`` to ``end`` of its parameter, which are a matrix."""
    first, last = max(begin, placed.start), min(end, placed.start + placed.count)
    return Placed(placed.offset + first - placed.start, first - begin, max(0, last - first))


def _totals(runs: Sequence[tuple[int, Placed]], replicas: int) -> list[int]:
    """Elements by replica, from runs that each go to, or come from, one."""
    totals = [0] * replicas
    for replica, run in runs:
        totals[replica] += run.count
    return totals


def _cut(values: Tensor, runs: Sequence[tuple[Any, ...]]) -> tuple[Tensor, ...]:
    """The elements of each run, which stand last in its tuple."""
    return torch.split(values, [run[-1].count for run in runs])


def _joined(runs: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(runs) == 1:
        return runs[0]
    return torch.cat(list(runs)) if runs else like.new_empty(0)

"""What ``torch.compile`` does with the operations of a block: those between two products become one kernel.

A kernel reads each tensor once that it is given, whatever happens to it in between, and writes what others read. What
the backward pass needs of a forward kernel's results it computes again from what that kernel was given, unless storing
them moves fewer bytes, as the compiler's partitioner chooses; results of products and attention are stored.

Source: Ansel et al., PyTorch 2, ASPLOS 2024, sections 4.3 (fusion) and 4.2 (min-cut recomputation).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.estimate.allocations import storage_number, tensors_in
from engine.estimate.operations import Operation, OperationCounter, Operations, counted_operation, is_free

_ALONE = frozenset(
    {
        *("embedding", "embedding_dense_backward", "index_put", "index_put_", "_index_put_impl_", "index_add"),
        *("index_add_", "scatter", "scatter_add", "scatter_add_", "sort", "topk"),
        *("nonzero", "native_dropout", "bernoulli_", "multinomial"),
    }
)
"""Operations that keep a kernel of their own, beside products and attention."""


@dataclass(frozen=True)
class _Part:
    """A part of a tensor's memory.

    Attributes:
        storage: Its number.
        offset: Where it begins.
        shape: Of the view.
        size: Bytes; of an expanded view only those in memory.
        limit: Bytes of the whole storage.
    """

    storage: int
    offset: int
    shape: torch.Size
    size: int
    limit: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Part":
        """That a tensor views."""
        limit = tensor.untyped_storage().nbytes()
        size = min(tensor.numel() * tensor.itemsize, limit)
        return cls(storage_number(tensor), int(tensor.storage_offset()), tensor.shape, size, limit)


@dataclass(frozen=True)
class _Step:
    """An operation in the order of the program.

    Attributes:
        operation: What it does alone.
        joins: Whether it can share a kernel with others.
        reads: What it reads.
        writes: What it writes.
        backward: Whether it belongs to the backward pass.
    """

    operation: Operation
    joins: bool
    reads: frozenset[_Part]
    writes: frozenset[_Part]
    backward: bool

    @property
    def touched(self) -> set[int]:
        """Storages that it reads or writes."""
        return {one.storage for one in self.reads | self.writes}


@dataclass
class _Kernel:
    """Joined operations.

    Attributes:
        steps: Their places in the program.
        reads: What they are given from outside.
        writes: All that they make.
    """

    steps: list[int] = field(default_factory=list)
    reads: set[_Part] = field(default_factory=set)
    writes: set[_Part] = field(default_factory=set)

    @property
    def made(self) -> set[int]:
        """Storages that they write."""
        return {one.storage for one in self.writes}


class FusedCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations of both passes on ``meta``; ``found`` has them as the compiler joins them."""

    def __init__(self) -> None:
        """Has recorded nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[_Step] = []
        self._held: list[torch.UntypedStorage] = []  # a new storage may get the number of a freed one
        self._in_backward = False
        self._returned: set[int] = set()

    @contextmanager
    def backward_pass(self, returned: Iterable[Tensor]) -> Iterator[None]:
        """Operations within the block belong to the backward pass; ``returned`` are the results of the forward pass."""
        self._returned |= {storage_number(one) for one in returned}
        self._in_backward = True
        try:
            with self:
                yield
        finally:
            self._in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and records it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if is_free(func):
            return out
        given, made = list(tensors_in((args, *kwargs.values()))), list(tensors_in((out,)))
        operation = counted_operation(func, args, kwargs, out)
        joins = operation.kind == "other" and func.overloadpacket.__name__ not in _ALONE
        reads, writes = frozenset(map(_Part.of, given)), frozenset(map(_Part.of, made))
        self._steps.append(_Step(operation, joins, reads, writes, self._in_backward))
        self._held += [one.untyped_storage() for one in (*given, *made)]
        return out

    def found(self) -> tuple[Operations, Operations]:
        """Operations of the forward and of the backward pass."""
        kernels = self._kernels()
        origin: dict[int, frozenset[_Part]] = {}  # by storage that a forward kernel makes: what that was given
        given: dict[int, Collection[_Part]] = {}  # by the first step of a kernel
        for kernel in kernels:
            first = self._steps[kernel.steps[0]]
            roots = frozenset[_Part]().union(*(origin.get(one.storage, frozenset({one})) for one in kernel.reads))
            given[kernel.steps[0]] = kernel.reads
            if first.joins and not first.backward:
                origin |= dict.fromkeys(kernel.made, roots)
            elif first.joins:
                stored = [one for one in kernel.reads if one.storage in origin]
                if _bytes(roots) <= _bytes(kernel.reads) + _bytes(stored):
                    given[kernel.steps[0]] = roots
                else:
                    self._returned |= {one.storage for one in stored}
        forward, backward = Counter[Operation](), Counter[Operation]()
        for kernel in kernels:
            first = self._steps[kernel.steps[0]]
            counter = backward if first.backward else forward
            if not first.joins:
                counter[first.operation] += 1
                continue
            written = [one for one in kernel.writes if self._is_written(one.storage, kernel)]
            moved = float(_bytes(given[kernel.steps[0]]) + _bytes(written))
            counter[Operation("other", first.operation.precision, 0.0, moved)] += 1
        return forward, backward

    def _kernels(self) -> list[_Kernel]:
        """The steps; between two that do not join, those that join and touch the same memory are together."""
        kernels: list[_Kernel] = []
        near: list[_Kernel] = []  # since the last step that does not join
        backward = False
        for place, step in enumerate(self._steps):
            if not step.joins or step.backward != backward:
                near, backward = [], step.backward
            if not step.joins:
                kernels.append(_Kernel([place], set(step.reads), set(step.writes)))
                continue
            touching = [one for one in near if step.touched & (one.made | {part.storage for part in one.reads})]
            joined = _Kernel()
            for other in touching:
                joined.steps += other.steps
                joined.reads |= other.reads
                joined.writes |= other.writes
                kernels.remove(other)
                near.remove(other)
            made = joined.made
            joined.reads |= {one for one in step.reads if one.storage not in made}
            joined.writes |= step.writes
            joined.steps = sorted([*joined.steps, place])
            kernels.append(joined)
            near.append(joined)
        return kernels

    def _is_written(self, storage: int, kernel: _Kernel) -> bool:
        """Whether what a kernel makes leaves it: as a result, which nobody reads, or for others that read it."""
        if storage in self._returned:
            return True
        inside, backward = set(kernel.steps), self._steps[kernel.steps[0]].backward
        readers = [
            place
            for place, step in enumerate(self._steps[kernel.steps[0] :], kernel.steps[0])
            if any(one.storage == storage for one in step.reads)
        ]
        outside = (self._steps[place] for place in readers if place not in inside)
        return not readers or any(not one.joins or one.backward == backward for one in outside)


class PassCounter:
    """Counts the operations of a forward and a backward pass, one by one or as a compiler joins them."""

    def __init__(self, *, fused: bool) -> None:
        """Has counted nothing.

        Args:
            fused: Whether a compiler joins them.
        """
        self._fused = FusedCounter() if fused else None
        self._alone = OperationCounter(), OperationCounter()

    def forward(self) -> AbstractContextManager[Any]:
        """Operations within the block are those of the forward pass."""
        return self._fused or self._alone[0]

    def backward(self, returned: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """Operations within the block are those of the backward pass from these results of the forward pass."""
        return self._alone[1] if self._fused is None else self._fused.backward_pass(returned)

    def found(self) -> tuple[Operations, Operations]:
        """Operations of both passes."""
        return (self._alone[0].found, self._alone[1].found) if self._fused is None else self._fused.found()


def count_passes(run: Callable[[], Tensor], *, fused: bool) -> tuple[Operations, Operations]:
    """Operations of the forward and of the backward pass of a calculation, from a gradient of ones.

    Args:
        run: The calculation.
        fused: Whether a compiler joins them.
    """
    counter = PassCounter(fused=fused)
    with counter.forward():
        out = run()
    ones = torch.ones_like(out)
    with counter.backward([out]):
        torch.autograd.backward([out], [ones])
    return counter.found()


def _bytes(parts: Iterable[_Part]) -> int:
    """Of parts of memory: of each storage no more than it has."""
    sums: Counter[int] = Counter()
    limits: dict[int, int] = {}
    for one in set(parts):
        sums[one.storage] += one.size
        limits[one.storage] = one.limit
    return sum(min(size, limits[storage]) for storage, size in sums.items())

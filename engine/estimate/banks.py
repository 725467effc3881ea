"""The work of banks of sparse experts, divided into what grows with the rows that they get and what does not.

A process of an expert-parallel group has a part of the experts, so that it casts, reads and writes a part of their
weights; and it has the rows that all processes of the group send there. Both parts follow from a bank's operations on
two numbers of rows.

Shapes: E experts of a bank, N rows in the experts' order.
"""

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.estimate.operations import OperationCounter, Operations, weighted
from moe.experts.bank import ExpertBank
from moe.experts.levels import FEWEST_ROWS, padded_rows
from moe.sparse import SparseFeedForward


@dataclass(frozen=True)
class BankWork:
    """Operations of banks in one direction of a pass. Counts may be negative: only what they add up to has a meaning.

    Attributes:
        rows: What grows with the rows, for those that come with even loads.
        weights: What does not, for all experts: mostly casts and traffic of their weights.
    """

    rows: Operations = field(default_factory=dict)
    weights: Operations = field(default_factory=dict)

    @classmethod
    def mean(cls, works: "list[tuple[BankWork, float]]") -> "BankWork":
        """The sum of several with factors."""
        rows, weights = ([(getattr(one, name), times) for one, times in works] for name in ("rows", "weights"))
        return cls(weighted(*rows), weighted(*weights))


@dataclass(frozen=True)
class BankCall:
    """One call of a bank.

    Attributes:
        bank: Called.
        rows: N, without those of no expert.
        sent: Bytes of its rows, those of no expert included.
        dtype: Of the rows.
        carried: Whether the rows get a gradient.
        backward: Whether a backward pass follows.
    """

    bank: ExpertBank
    rows: int
    sent: int
    dtype: torch.dtype
    carried: bool
    backward: bool

    @property
    def form(self) -> Hashable:
        """All that its operations depend on."""
        parameters = tuple((one.shape, one.dtype, one.requires_grad) for one in self.bank.parameters())
        return parameters, self.bank.implementation, self.rows, self.dtype, self.carried, self.backward


@contextmanager
def even_loads(part: nn.Module) -> Iterator[None]:
    """Gives all experts of every bank as many rows within the block, whatever routers say about blank samples.

    On ``meta``, where numbers of rows have no values, it changes nothing.
    """

    def even(bank: ExpertBank, given: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, tokens, *more = given
        return given if tokens.is_meta else (rows, _even(tokens), *more)

    handles = [bank.register_forward_pre_hook(even) for bank in _banks(part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_of_banks(part: nn.Module) -> Iterator[list[BankCall]]:
    """The calls of banks within the block, in their order."""
    calls: list[BankCall] = []

    def note(bank: ExpertBank, given: tuple[Tensor, ...]) -> None:
        rows, tokens = given[:2]
        trained = rows.requires_grad or any(one.requires_grad for one in bank.parameters())
        calls.append(
            BankCall(
                bank,
                len(rows) if tokens.is_meta else int(tokens.sum()),
                rows.nbytes,
                rows.dtype,
                rows.requires_grad,
                trained and torch.is_grad_enabled(),
            )
        )

    handles = [bank.register_forward_pre_hook(note) for bank in _banks(part)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class BankCounter:
    """Counts calls of banks; calls of one form once."""

    def __init__(self) -> None:
        """Has counted nothing."""
        self._known: dict[Hashable, tuple[BankWork, BankWork]] = {}

    def work(self, forward: list[BankCall], again: list[BankCall]) -> tuple[BankWork, BankWork]:
        """The work of a pass' banks, forward and backward.

        Args:
            forward: Calls of the forward pass.
            again: Those of the backward pass: recomputation.
        """
        there = [self._counted(one) for one in forward]
        back = [self._counted(one)[0] for one in again]
        return (
            BankWork.mean([(one, 1.0) for one, _ in there]),
            BankWork.mean([(one, 1.0) for one in (*(one for _, one in there), *back)]),
        )

    def _counted(self, call: BankCall) -> tuple[BankWork, BankWork]:
        if call.form not in self._known:
            self._known[call.form] = _divided(call)
        return self._known[call.form]


def _divided(call: BankCall) -> tuple[BankWork, BankWork]:
    """A call's work: operations are taken to be affine functions of the rows, between two numbers of them.

    Both are numbers to which a CPU's kernel pads. What it pads beside them is no work of rows.
    """
    each = call.rows / call.bank.num_experts
    more = max(padded_rows(math.ceil(each)), 2 * FEWEST_ROWS)
    fewer = padded_rows(more // 2)
    slope = each / (more - fewer)
    found = []
    for many, few in zip(_operations(call, more), _operations(call, fewer), strict=True):
        rows = weighted((many, slope), (few, -slope))
        at_none = more / (more - fewer)
        found.append(BankWork(rows, weighted((many, 1.0 - at_none), (few, at_none))))
    return found[0], found[1]


def _operations(call: BankCall, rows_of_each: int) -> tuple[Operations, Operations]:
    """Operations of a bank forward and backward, where each expert has so many rows."""
    bank, forward, backward = call.bank, OperationCounter(), OperationCounter()
    shape = rows_of_each * bank.num_experts, bank.hidden_size
    rows = bank.fc1_weight.new_zeros(shape, dtype=call.dtype).requires_grad_(call.carried)
    tokens = torch.full((bank.num_experts,), rows_of_each, device=rows.device)
    for parameter in bank.parameters():
        parameter.grad = None  # adding to a gradient would be a further operation
    with torch.set_grad_enabled(call.backward):
        with forward:
            made = bank.forward(rows, tokens)  # its hooks are not meant
        if call.backward:
            gradient = torch.ones_like(made)
            with backward:
                torch.autograd.backward([made], [gradient])
    for parameter in bank.parameters():
        parameter.grad = None
    return forward.found, backward.found


def _even(tokens: Tensor) -> Tensor:
    """int64 ``[E]`` of the same sum, as equal as can be."""
    each, rest = divmod(int(tokens.sum()), len(tokens))
    return torch.arange(len(tokens)).lt(rest).to(tokens.dtype) + each


def _banks(part: nn.Module) -> list[ExpertBank]:
    return [module.experts for module in part.modules() if isinstance(module, SparseFeedForward)]

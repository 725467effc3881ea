"""Operations of a device, counted while they are dispatched: floating point operations, bytes moved, how many.

Each operation takes the longer of its time for products and its time for bytes (a roofline). Views and allocations cost
nothing.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from engine.estimate.allocations import tensors_in

Kind = Literal["product", "attention", "other"]

_FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
)
_ROWS_ONLY = ("embedding", "index_select", "gather", "index")  # read as much of their first argument as they return


@dataclass(frozen=True)
class Operation:
    """The work of one operation.

    Attributes:
        kind: Matrix product, fused attention, anything else.
        precision: ``bf16``, or ``fp32`` for every other type.
        flops: Floating point operations of its products; 0 for ``other``.
        bytes: Read and written.
        shape: Of a product: number of equal ones, rows, columns, depth. Of attention: keys that a query looks at on
            average, width of a head. Empty where it is neither or not known.
    """

    kind: Kind
    precision: Literal["fp32", "bf16"]
    flops: float
    bytes: float
    shape: tuple[int, ...] = ()


Operations = Mapping[Operation, float]
"""How often each operation is done; a mean over kinds of steps need not be whole."""

STARTED = Operation("other", "fp32", 0.0, 0.0)
"""An operation that does nothing."""


def weighted(*parts: tuple[Operations, float]) -> Operations:
    """The sum of operations, each as often as the factor beside them says."""
    total: dict[Operation, float] = {}
    for operations, times in parts:
        for operation, count in operations.items():
            total[operation] = total.get(operation, 0.0) + times * count
    return total


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts dispatched operations, forward or backward, on any device and on ``meta``.

    Attributes:
        found: The operations counted so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts it."""
        out = func(*args, **(kwargs or {}))
        if not is_free(func):
            self.found[counted_operation(func, args, kwargs or {}, out)] += 1
        return out


def is_free(func: Any) -> bool:
    """Whether an operation costs nothing: a view, or an allocation."""
    return func.overloadpacket.__name__ in _FREE or func.is_view


def counted_operation(func: Any, args: Any, kwargs: Any, out: Any) -> Operation:
    """The work of an operation that has run.

    Args:
        func: That was dispatched.
        args: Its arguments.
        kwargs: Those with names.
        out: Its result.
    """
    name = func.overloadpacket.__name__
    given = list(tensors_in((args, *kwargs.values())))
    made = list(tensors_in((out,)))
    written = sum(map(_nbytes, made))
    read = written if name in _ROWS_ONLY else sum({id(one): _nbytes(one) for one in given}.values())
    floats = [one for one in (*given, *made) if one.is_floating_point()]
    precision: Literal["fp32", "bf16"] = "bf16" if floats and floats[0].dtype == torch.bfloat16 else "fp32"
    flops = _flops(func, name, args, kwargs, out)
    kind: Kind = "other" if not flops else ("attention" if "attention" in name else "product")
    if kind == "attention" and "for_cpu" not in name:
        named = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        keys, width = named["key"].shape[-2:]
        if named.get("is_causal"):  # a query looks at half of the keys on average
            return Operation(kind, precision, flops / 2, read + written, (keys // 2, width))
        return Operation(kind, precision, flops, read + written, (keys, width))
    return Operation(kind, precision, flops, read + written, _product_shape(name, args, kwargs) if flops else ())


def _product_shape(name: str, args: Any, kwargs: Any) -> tuple[int, ...]:
    """Number, rows, columns and depth of a product; empty for convolutions, whose kernels choose their own."""
    if name in ("addmm", "baddbmm"):
        args = args[1:]
    if name in ("mm", "addmm"):
        return 1, args[0].shape[0], args[1].shape[1], args[0].shape[1]
    if name in ("bmm", "baddbmm"):
        return *args[0].shape[:2], args[1].shape[2], args[0].shape[2]
    if name == "_grouped_mm" and args[0].dim() == 2:
        rows, bank = args[:2]
        if bank.dim() == 3:
            return len(bank), math.ceil(len(rows) / len(bank)), bank.shape[2], rows.shape[1]
        groups = len(args[2] if len(args) > 2 else kwargs["offs"])  # of two tensors of rows a product for each group
        return groups, rows.shape[0], bank.shape[1], math.ceil(rows.shape[1] / groups)
    return ()


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
    counted: float = 0.0
    if name == "_grouped_mm":  # every row meets one matrix, or the rows of two tensors meet group by group
        rows, bank = args[:2]
        counted = 2.0 * rows.shape[-2] * rows.shape[-1] * bank.shape[-1]
    elif name == "_linear_pointwise":
        rows, weight = args[:2]
        counted = 2.0 * rows.numel() * weight.shape[0]
    elif name == "_scaled_dot_product_flash_attention_for_cpu":
        query, key = args[:2]
        counted = 4.0 * query.numel() * key.shape[-2]
    elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        query, key = args[1:3]
        counted = 10.0 * query.numel() * key.shape[-2]  # the scores are multiplied anew
    elif (formula := flop_registry.get(func.overloadpacket)) is not None:
        counted = float(formula(*args, **kwargs, out_val=out))
    return counted


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of an expanded one only those in memory."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())

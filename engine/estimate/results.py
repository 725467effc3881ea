"""Results of operations, remembered: on ``meta`` all, on a CPU the form of the costly ones.

A tensor on ``meta`` is its shape, strides and type. What an operation returns for it depends on nothing else, but torch
works it out in Python, for most operations within some tenths of a millisecond. A model does the same operations on the
same shapes in every block, so that nearly all results are known already.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from engine.estimate.allocations import tensors_in

_META = torch.device("meta")


class MetaResults:
    """Calls operations, and makes results of the same form where an equal call was made before.

    Only what is a pure function of its arguments' form is remembered: results in memory of their own, of operations
    that write to nothing, and the tensor itself where an operation writes to its first argument. Anything else is
    called.
    """

    def __init__(self) -> None:
        self._forms: dict[Hashable, _Form | None] = {}
        self._writes: dict[Any, bool | None] = {}

    def __len__(self) -> int:
        """Number of different calls."""
        return len(self._forms)

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns; the values of tensors on ``meta`` do not exist."""
        if func not in self._writes:
            self._writes[func] = _writes(func)
        writes = self._writes[func]
        if writes is None:
            return func(*args, **kwargs)
        try:
            given = _form_of(args)
            key = func, given, _form_of(tuple(kwargs.items()))
        except _NotRememberedError:
            return func(*args, **kwargs)
        known = self._forms.get(key, _UNKNOWN)
        if isinstance(known, _Form):
            return args[0] if writes else known.made()
        out = func(*args, **kwargs)
        if known is _UNKNOWN:
            self._forms[key] = _form_in_place(args, given, out) if writes else _form_of_result(args, kwargs, out)
        return out


_COSTLY = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "baddbmm_", "_linear_pointwise", "convolution", "convolution_backward"),
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        *("gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward"),
    }
)
"""Operations that take most of a CPU's time, and whose values decide about no other operation."""

_LARGE = 2**20
"""Elements from which on results of floating point are activations: no numbers by which rows are drawn."""


class BlankResults:
    """Calls a CPU's operations, the costly ones once for each form of arguments: then their results are zeros.

    Costly are products and the like, and all that gives large tensors of floating point from others. Which operations
    follow, and what memory they take, is the same: those that choose shapes by values (masks, places, numbers of rows)
    are called.
    """

    def __init__(self, large: int = _LARGE) -> None:
        """Remembers nothing yet.

        Args:
            large: Elements of a large tensor.
        """
        self._large = large
        self._writes: dict[Any, bool | None] = {}
        self._forms: dict[Hashable, tuple[bool, list[_Memory | None]]] = {}

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns, or zeros of the same form."""
        if not self._is_costly(func, args, kwargs):
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # what is written into is there already
            return kwargs["out"] if "out" in kwargs else args[0]
        try:
            key = func, _form_of(args, on_cpu=True), _form_of(tuple(kwargs.items()), on_cpu=True)
        except _NotRememberedError:
            return func(*args, **kwargs)
        if key in self._forms:
            single, memories = self._forms[key]
            made = [None if one is None else one.zeros() for one in memories]
            return made[0] if single else tuple(made)
        out = func(*args, **kwargs)
        single = isinstance(out, Tensor)
        found = (out,) if single else out
        known = {one._cdata for one in _memory(list(tensors_in((args, *kwargs.values()))))}
        if all(
            one is None
            or (isinstance(one, Tensor) and one.is_floating_point() and one.untyped_storage()._cdata not in known)
            for one in found
        ):
            self._forms[key] = single, [None if one is None else _Memory.of(one) for one in found]
        return out

    def _is_costly(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        if func.overloadpacket.__name__ in _COSTLY:
            return True
        given = list(tensors_in((args, *kwargs.values())))
        if not any(one.numel() >= self._large for one in given) or not all(one.is_floating_point() for one in given):
            return False
        if func not in self._writes:
            self._writes[func] = _writes(func)
        return self._writes[func] is not None


@dataclass(frozen=True)
class _Memory:
    """The form of a result in memory of its own, which has ``elements``."""

    shape: torch.Size
    stride: tuple[int, ...]
    elements: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.shape, tensor.stride(), elements, tensor.dtype)

    def zeros(self) -> Tensor:
        """Memory that the system gives zeroed, where it is large."""
        return torch.zeros(self.elements, dtype=self.dtype).as_strided(self.shape, self.stride)


class _NotRememberedError(Exception):
    """An argument is not known by its form."""


_UNKNOWN = object()


class _Form:
    """The form of what an operation returns: one tensor or several."""

    def __init__(self, tensors: Sequence[tuple[Any, Any, torch.dtype] | None], single: bool) -> None:
        self.tensors, self.single = tensors, single

    def made(self) -> Any:
        """New tensors of this form."""
        made = [
            None if one is None else torch.empty_strided(one[0], one[1], dtype=one[2], device=_META)
            for one in self.tensors
        ]
        return made[0] if self.single else tuple(made)


def _writes(func: Any) -> bool | None:
    """Whether an operation writes to its first argument and returns it; None for what is called every time."""
    schema = func._schema
    aliased = [one.alias_info for one in schema.arguments if one.alias_info is not None]
    returned = [one.alias_info for one in schema.returns if one.alias_info is not None]
    if not aliased and not returned:
        return False
    first = schema.arguments[0].alias_info
    in_place = len(aliased) == len(returned) == len(schema.returns) == 1 and first is not None and first.is_write
    return True if in_place else None


def _form_of(value: Any, *, on_cpu: bool = False) -> Hashable:
    """What distinguishes one argument from others; tensors are on ``meta``, or on the CPU.

    Raises:
        _NotRememberedError: It is a tensor elsewhere, or not known by its value.
    """
    if isinstance(value, Tensor):
        if value.device.type != ("cpu" if on_cpu else "meta"):
            raise _NotRememberedError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return type(value), *(_form_of(one, on_cpu=on_cpu) for one in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout):
        return type(value), value  # 1, 1.0 and True are equal, and give different types
    if isinstance(value, torch.memory_format):
        return value
    raise _NotRememberedError


def _form_in_place(args: Sequence[Any], before: Hashable, out: Any) -> _Form | None:
    """A form for an operation that left its first argument in shape; None if it did not."""
    return _Form((), single=True) if out is args[0] and _form_of(args) == before else None


def _form_of_result(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> _Form | None:
    """The form of a result; None if it shares memory with an argument or has memory that its form does not tell."""
    single = not isinstance(out, tuple)
    tensors = (out,) if single else out
    if any(one is not None and (not isinstance(one, Tensor) or one.device != _META) for one in tensors):
        return None
    form = _Form([None if one is None else (one.shape, one.stride(), one.dtype) for one in tensors], single)
    again = form.made()
    memory, other = _memory(tensors), _memory((again,) if single else again)
    given = {one._cdata for one in _memory(list(tensors_in((args, *kwargs.values()))))}
    apart = len({one._cdata for one in memory} - given) == len(memory)
    alike = [one.nbytes() for one in memory] == [one.nbytes() for one in other]
    return form if apart and alike else None


def _memory(tensors: Sequence[Any]) -> list[torch.UntypedStorage]:
    """The memory of each tensor among these."""
    return [one.untyped_storage() for one in tensors if isinstance(one, Tensor)]

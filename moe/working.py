"""Parameters in the dtype of the activations: copies that a layer makes together, instead of a cast at every use.

A layer calls its modules within ``working_copies``. ``working`` gives them the copy of a parameter. The first pass
casts what is asked for one by one and remembers it; further passes copy all of it by one operation, and one operation
of their backward pass turns the gradients back into the parameters' dtype. The numbers are those of single casts.

A parameter whose storage exists only while it is used (``gather_on_use``) has no copies: they would keep it in memory
between the two passes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")

_ALIGNED = 64
"""Elements of which each copy begins at a multiple: products want their matrices at multiples of 16 bytes."""

_Key = tuple[int, torch.dtype]


class WorkingCopies:
    """What the passes of a layer have asked for.

    Attributes:
        asked: The parameters by themselves and by the dtype.
        ready: Copies of these, in their order, where they were made together with those of other layers.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.asked: dict[_Key, nn.Parameter] = {}
        self.ready: dict[_Key, Tensor] = {}

    def cast(self) -> Iterator[nn.Parameter]:
        """The parameters of which every use that is known casts them."""
        yield from (one for (_, dtype), one in self.asked.items() if used_in(one) in (None, dtype))

    def __reduce__(self) -> tuple[type["WorkingCopies"], tuple[()]]:
        """A copied or pickled layer has parameters of its own."""
        return WorkingCopies, ()


@contextmanager
def made_ready(layers: Sequence[WorkingCopies]) -> Iterator[None]:
    """Makes the copies of several layers by one operation, for all passes within the block."""
    for dtype in {dtype for layer in layers for _, dtype in layer.asked}:
        asked = [{key: one for key, one in layer.asked.items() if key[1] == dtype} for layer in layers]
        # Memory of its own for each layer, so that it is free again as soon as the layer's backward pass is done.
        memory = [_memory_for(list(own.values()), dtype) for own in asked]
        copy_together([copy for own in memory for copy in own], [one for own in asked for one in own.values()])
        for layer, own, copies in zip(layers, asked, memory, strict=True):
            layer.ready.update(zip(own, copies, strict=True))
    try:
        yield
    finally:
        for layer in layers:
            layer.ready = {}


class _Pass:
    """The copies of one pass of a layer.

    Attributes:
        copies: The layer's.
    """

    def __init__(self, copies: WorkingCopies) -> None:
        """Copies everything that earlier passes asked for, or takes what is ready."""
        self.copies, self._asked, self._made = copies, copies.asked, dict[_Key, Tensor]()
        self._with_graph = torch.is_grad_enabled()
        asked = dict(copies.asked)
        for dtype in {dtype for _, dtype in asked}:
            keys = [key for key in asked if key[1] == dtype]
            ready = [copies.ready[key] for key in keys if key in copies.ready]
            own = [asked[key] for key in keys]
            made = _Copies.apply(dtype, ready if len(ready) == len(own) else None, *own)  # type: ignore[no-untyped-call]
            self._made.update(zip(keys, made, strict=True))

    def give(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """The copy of a parameter; a cast of its own where no earlier pass has asked for it."""
        key = id(parameter), dtype
        if key not in self._made:
            # Also where a part without a graph asks first: others of this pass may need it.
            with torch.set_grad_enabled(self._with_graph):
                self._asked[key], self._made[key] = parameter, parameter.to(dtype)
        return self._made[key]


class _Current(threading.local):
    on: _Pass | None = None


_current = _Current()


@contextmanager
def working_copies(copies: WorkingCopies) -> Iterator[None]:
    """Makes copies for what is called within the block."""
    with _as_current(_Pass(copies)):
        yield


def working(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter, or a part of one, in ``dtype``, with gradient."""
    if parameter.dtype == dtype:
        return parameter
    if torch.compiler.is_compiling():
        return parameter.to(dtype)
    note_use(parameter, dtype)
    if _current.on is None or not isinstance(parameter, nn.Parameter) or is_gathered_on_use(parameter):
        return parameter.to(dtype)
    return _current.on.give(parameter, dtype)


def note_use(parameter: Tensor, dtype: torch.dtype) -> None:
    """Notes that a parameter is cast to ``dtype``, so that a host may as well send it so."""
    if parameter.dtype != dtype and isinstance(parameter, nn.Parameter) and used_in(parameter) is None:
        parameter.used_in = dtype  # type: ignore[attr-defined]


def keep_exact(parameter: nn.Parameter) -> None:
    """Marks a parameter that is also used without a cast."""
    parameter.used_in = parameter.dtype  # type: ignore[attr-defined]


def used_in(parameter: Tensor) -> torch.dtype | None:
    """The dtype to which every use casts a parameter, its twin's step left out; None where that is not known."""
    return getattr(parameter, "used_in", None)


def with_working_copies(function: Callable[..., Result], *, anew: bool = False) -> Callable[..., Result]:
    """The function with the copies of this pass, for a backward pass that calls it again.

    Args:
        function: A part of a layer.
        anew: Copies are made anew then, instead of being kept until then: where nothing else keeps them.
    """
    held = _current.on
    if held is None:
        return function
    copies = held.copies

    def call(*inputs: Any) -> Result:
        with _as_current(held):
            return function(*inputs)

    def call_anew(*inputs: Any) -> Result:
        if _current.on is not None:
            return function(*inputs)
        with working_copies(copies):
            return function(*inputs)

    return call_anew if anew else call


def gather_on_use(parameter: nn.Parameter) -> None:
    """Marks a parameter whose storage exists only while it is used."""
    parameter.gathered_on_use = True  # type: ignore[attr-defined]


def is_gathered_on_use(parameter: Tensor) -> bool:
    """Whether it is so marked."""
    return getattr(parameter, "gathered_on_use", False)


@contextmanager
def _as_current(one: _Pass) -> Iterator[None]:
    before, _current.on = _current.on, one
    try:
        yield
    finally:
        _current.on = before


class _Copies(torch.autograd.Function):
    """Parameters in another dtype, by one operation each way."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, ready: Sequence[Tensor] | None, *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.shapes, ctx.device = [parameter.shape for parameter in parameters], parameters[0].device
        ctx.set_materialize_grads(False)
        copies = _copied(parameters, dtype) if ready is None else [one.detach() for one in ready]
        resting = [copy for copy, one in zip(copies, parameters, strict=True) if not one.requires_grad]
        ctx.mark_non_differentiable(*resting)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(gradients)
        for dtype in set(ctx.dtypes):
            given = {
                place: gradient
                for place, (own, gradient) in enumerate(zip(ctx.dtypes, gradients, strict=True))
                if gradient is not None and own == dtype
            }
            for place, copy in zip(given, _copied(list(given.values()), dtype), strict=True):
                found[place] = copy
            # A hook of a parameter runs whether it gets a gradient or not, and DeepSpeed's wants one.
            missing = {
                place: shape
                for place, (own, shape) in enumerate(zip(ctx.dtypes, ctx.shapes, strict=True))
                if gradients[place] is None and own == dtype and ctx.needs_input_grad[2 + place]
            }
            for place, zeros in zip(missing, _zeros(list(missing.values()), dtype, ctx.device), strict=True):
                found[place] = zeros
        return None, None, *found


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = _memory_for(tensors, dtype)
    copy_together(copies, tensors)
    return copies


def _zeros(shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeros in one piece of memory."""
    if not shapes:
        return []
    sizes = [shape.numel() for shape in shapes]
    memory = torch.zeros(sum(sizes), dtype=dtype, device=device)
    return [part.view(shape) for part, shape in zip(torch.split(memory, sizes), shapes, strict=True)]


def _memory_for(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of the same shapes in one piece of memory."""
    if not tensors:
        return []
    starts = [0, *accumulate(-(-tensor.numel() // _ALIGNED) * _ALIGNED for tensor in tensors)]
    memory = torch.empty(starts[-1], dtype=dtype, device=tensors[0].device)
    return [
        memory[start : start + tensor.numel()].view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=False)
    ]


def copy_together(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies tensors into others of the same shapes by one operation."""
    if tensors:
        with torch.no_grad():
            torch._foreach_copy_(list(copies), list(tensors))

"""A state as three flat tensors: the form in which one pipeline stage sends it to the next.

``header``: bytes on the host, which say what the others hold; JSON, nothing of it is unpickled. ``words``: one bf16
tensor of all tensors with a gradient, behind one number that is always there: bf16 as it is, fp32 as the two halves of
its bits, so that every value and every gradient arrives exactly. ``raw``: bytes of all other tensors. DeepSpeed wants
one tensor with a gradient, since it runs a backward pass for each.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.hosts.micro_batch import LayoutKey, PlanLayout
from engine.hosts.sending import Form, apart, room_of, together
from omnivl.chain.state import State

_FLOATS = (torch.float32, torch.bfloat16)
_TYPES = {
    str(one).removeprefix("torch."): one
    for one in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}
"""Types by their names in a header."""

Packed = tuple[Tensor, Tensor, Tensor]
"""Header, words, raw."""


@dataclass(frozen=True)
class _Entry:
    """Position of a tensor.

    Attributes:
        name: Its name in the state.
        dtype: Its type.
        shape: Its shape.
        carried: Whether it has a gradient and is in ``words``, in order; else it is in ``raw``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    carried: bool


def pack(state: State, token: Tensor, key: LayoutKey, wanted: Collection[str] | None = None) -> Packed:
    """Packs a state of a training step.

    Args:
        state: Any; names, types and shapes may change from step to step.
        token: fp32 ``[1]`` with a gradient: the first number of ``words``, so that it always has one.
        key: The properties of the batch that determine the state's layout.
        wanted: Names to pack; all where it is not given.
    """
    entries: list[tuple[str, str, tuple[int, ...], bool]] = []
    carried, others = [token], list[Tensor]()
    for name, tensor in state.items():
        if wanted is not None and name not in wanted:
            continue
        carries = tensor.requires_grad and tensor.dtype in _FLOATS
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), carries))
        if carries:
            carried.append(tensor)
        else:
            others.append(tensor)
    text = bytearray(json.dumps([key, entries], separators=(",", ":")).encode())
    words: Tensor = _Joined.apply(*carried)  # type: ignore[no-untyped-call]
    raw = together(others, torch.zeros(room_of(others), dtype=torch.uint8, device=token.device))
    return torch.frombuffer(text, dtype=torch.uint8), words, raw


def unpack(packed: Packed, plan_layout: PlanLayout) -> tuple[State, Tensor, LayoutKey]:
    """The inverse of ``pack``; gradients lead back to ``words``.

    Args:
        packed: Of ``pack``.
        plan_layout: Computes the layout from the key; the same on every stage.
    """
    header, words, raw = packed
    key, listed = _said(header)
    entries = [_Entry(name, _TYPES[dtype], tuple(shape), carried) for name, dtype, shape, carried in listed]
    forms: dict[bool, list[Form]] = {True: [((1,), torch.float32)], False: []}
    for one in entries:
        forms[one.carried].append((one.shape, one.dtype))
    token, *pieces = _Parted.apply(words, forms[True])  # type: ignore[no-untyped-call]
    sources = {True: iter(pieces), False: iter(apart(raw, forms[False]))}
    tensors = {one.name: next(sources[one.carried]) for one in entries}
    typed = LayoutKey(*key)
    return State(tensors, plan_layout(*typed)), token, typed


def key_of(packed: Packed) -> LayoutKey:
    """The key that was packed with a state."""
    return LayoutKey(*_said(packed[0])[0])


def _said(header: Tensor) -> Any:
    return json.loads(header.numpy().tobytes())


class _Joined(torch.autograd.Function):
    """Tensors end to end as words of 16 bits; gradients come back in the same way."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.forms = [(one.shape, one.dtype) for one in tensors]
        return torch.cat([_words_of(one) for one in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(_parts(grads[0], ctx.forms))


class _Parted(torch.autograd.Function):
    """The reverse of ``_Joined``."""

    @staticmethod
    def forward(ctx: Any, words: Tensor, forms: Sequence[Form]) -> tuple[Tensor, ...]:
        return tuple(_parts(words, forms))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat([_words_of(one) for one in grads]), None


def _words_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    if flat.stride(0) != 1:  # a single number may have any stride
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.bfloat16)


def _parts(words: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """Copies of the tensors of which ``words`` consists."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize // words.itemsize for shape, dtype in forms]
    pieces = torch.split(words.detach(), sizes)
    return [piece.clone().view(dtype).view(shape) for piece, (shape, dtype) in zip(pieces, forms, strict=True)]

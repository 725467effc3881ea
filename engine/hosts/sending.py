"""Tensors of a state as one: to a device, which copies it beside its work, or to another process."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes at a multiple of which a tensor begins."""


def sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies tensors of the host to a device, in order.

    To a GPU they travel together, from memory that is pinned, on a stream of their own: the host does not wait, and the
    copy overlaps with what the GPU computes. Only what is computed afterwards waits for it.
    """
    if device.type != "cuda":
        return [one.to(device, non_blocking=True) for one in tensors]
    whole = together(tensors, torch.empty(room_of(tensors), dtype=torch.uint8, pin_memory=True))
    copying, computing = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        there = whole.to(device, non_blocking=True)
    computing.wait_stream(copying)
    there.record_stream(computing)
    return apart(there, [(one.shape, one.dtype) for one in tensors])


Form = tuple[Sequence[int], torch.dtype]
"""Shape and type of a tensor."""


def together(tensors: Sequence[Tensor], whole: Tensor) -> Tensor:
    """Writes tensors into bytes, each at a multiple of ``_ALIGNMENT``.

    Args:
        tensors: On the host, or on the device of ``whole``.
        whole: uint8, ``[room_of(tensors)]``.
    """
    start = 0
    for one in tensors:
        whole[start : start + one.nbytes].copy_(one.detach().contiguous().flatten().view(torch.uint8))
        start += _rounded(one.nbytes)
    return whole


def apart(whole: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The tensors of these forms that were written into bytes, as views of them."""
    found, start = [], 0
    for shape, dtype in forms:
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(whole[start : start + size].view(dtype).view(torch.Size(shape)))
        start += _rounded(size)
    return found


def room_of(tensors: Sequence[Tensor]) -> int:
    """Bytes that ``together`` writes."""
    return sum(_rounded(one.nbytes) for one in tensors)


def _rounded(size: int) -> int:
    return _ALIGNMENT * math.ceil(size / _ALIGNMENT)


@lru_cache
def _copies(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

"""From the host's memory to a device: all tensors of a state as one copy, which the device makes beside its work."""

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
    size = sum(_room(one) for one in tensors)
    whole = together(tensors, torch.empty(size, dtype=torch.uint8, pin_memory=True))
    copying, computing = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        there = whole.to(device, non_blocking=True)
    computing.wait_stream(copying)
    there.record_stream(computing)
    return apart(there, tensors)


def together(tensors: Sequence[Tensor], whole: Tensor) -> Tensor:
    """Writes tensors into bytes, each at a multiple of ``_ALIGNMENT``.

    Args:
        tensors: On the host.
        whole: uint8, with room for all.
    """
    start = 0
    for one in tensors:
        whole[start : start + one.nbytes].copy_(one.contiguous().flatten().view(torch.uint8))
        start += _room(one)
    return whole


def apart(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that were written into bytes, as views of them; ``like`` has their types and shapes."""
    found, start = [], 0
    for one in like:
        found.append(whole[start : start + one.nbytes].view(one.dtype).view(one.shape))
        start += _room(one)
    return found


def _room(tensor: Tensor) -> int:
    return _ALIGNMENT * math.ceil(tensor.nbytes / _ALIGNMENT)


@lru_cache
def _copies(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

"""A state as two flat tensors, in which form it crosses from one pipeline stage to the next.

``flat``: fp32, everything that carries a gradient, behind one element that is always there. ``raw``: bytes, everything
else, behind a header that says what lies where, and the layout. One float tensor before one of integers at every
boundary: DeepSpeed sends floats first, wants a gradient for each, walks the graph once for each, and reuses the memory
of what it receives by place and size without a look at the type.

bf16 travels as fp32: exact both ways, twice the bytes.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnivl.chain.state import State, StepLayout

_ALIGNMENT = 8
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies.

    Attributes:
        name: Its name in the state.
        dtype: Its type.
        shape: Its shape.
        flat: Whether it carries a gradient and lies in ``flat``, in order; else in ``raw``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    flat: bool


def pack(state: State, token: Tensor) -> tuple[Tensor, Tensor]:
    """Packs a state.

    Args:
        state: Any; names, types and shapes may change from step to step.
        token: fp32 ``[1]`` with a gradient, which stands in front of ``flat`` so that there always is one.
    """
    entries: list[_Entry] = []
    floats, chunks = [token], [torch.empty(0, dtype=torch.uint8, device=token.device)]
    for name, tensor in state.items():
        carries = tensor.requires_grad and tensor.dtype in _FLOATS
        entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), carries))
        if carries:
            floats.append(tensor.flatten().float())
        else:
            chunks.append(_bytes_of(tensor))
    header = np.frombuffer(pickle.dumps((entries, state.layout)), dtype=np.uint8)
    length = np.array([len(header)], dtype=np.int64).view(np.uint8)
    head = torch.from_numpy(np.concatenate([length, _padded(header)])).to(token.device)
    return torch.cat(floats), torch.cat([head, *chunks])


def unpack(flat: Tensor, raw: Tensor) -> tuple[State, Tensor]:
    """The inverse of ``pack``; gradients lead back to ``flat``."""
    length = int(raw[:_ALIGNMENT].cpu().numpy().view(np.int64)[0])
    start = _ALIGNMENT + _rounded(length)
    header = raw[_ALIGNMENT : _ALIGNMENT + length].cpu().numpy().tobytes()
    found: tuple[Sequence[_Entry], StepLayout] = pickle.loads(header)
    entries, layout = found
    carried = [entry for entry in entries if entry.flat]
    token, *pieces = torch.split(flat, [1, *(_numel(entry) for entry in carried)])
    floats = {entry.name: piece.view(entry.shape).to(entry.dtype) for entry, piece in zip(carried, pieces, strict=True)}
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.flat:
            tensors[entry.name] = floats[entry.name]
            continue
        size = _numel(entry) * entry.dtype.itemsize
        tensors[entry.name] = raw[start : start + size].view(entry.dtype).view(entry.shape)
        start += _rounded(size)
    return State(tensors, layout), token


def _bytes_of(tensor: Tensor) -> Tensor:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    missing = _rounded(len(content)) - len(content)
    return torch.cat([content, content.new_zeros(missing)]) if missing else content


def _padded(array: Any) -> Any:
    return np.concatenate([array, np.zeros(_rounded(len(array)) - len(array), dtype=np.uint8)])


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _numel(entry: _Entry) -> int:
    return torch.Size(entry.shape).numel()

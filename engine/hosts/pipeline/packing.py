"""A state as two flat tensors: the form in which one pipeline stage sends it to the next.

``flat``: fp32, one element that is always there, then all tensors with a gradient. ``raw``: bytes, a header, then all
other tensors. Every boundary has one float tensor and then one integer tensor, since DeepSpeed sends floats first,
needs a gradient for each, runs one backward pass for each, and reuses receive buffers by position and size whatever the
type.

bf16 is sent as fp32: this is exact, and takes twice the bytes.

The header is JSON: name, type and shape of each tensor, and the properties of the batch that determine its layout. No
received data is unpickled.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.hosts.micro_batch import LayoutKey, PlanLayout
from omnivl.chain.state import State

_ALIGNMENT = 8
_USUAL = 8192
_FLOATS = (torch.float32, torch.bfloat16)
_TYPES = {
    str(one).removeprefix("torch."): one
    for one in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}
"""Types by their names in a header."""


@dataclass(frozen=True)
class _Entry:
    """Position of a tensor.

    Attributes:
        name: Its name in the state.
        dtype: Its type.
        shape: Its shape.
        flat: Whether it has a gradient and is in ``flat``, in order; else it is in ``raw``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    flat: bool


def pack(state: State, token: Tensor, key: LayoutKey) -> tuple[Tensor, Tensor]:
    """Packs a state of a training step.

    Args:
        state: Any; names, types and shapes may change from step to step.
        token: fp32 ``[1]`` with a gradient: the first element of ``flat``, so that it always has one.
        key: The properties of the batch that determine the state's layout.
    """
    entries: list[tuple[str, str, tuple[int, ...], bool]] = []
    floats, chunks = [token], [torch.empty(0, dtype=torch.uint8, device=token.device)]
    for name, tensor in state.items():
        carries = tensor.requires_grad and tensor.dtype in _FLOATS
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), carries))
        if carries:
            floats.append(tensor.flatten().float())
        else:
            chunks.append(_bytes_of(tensor))
    text = json.dumps([key, entries], separators=(",", ":")).encode()
    header = np.zeros(_rounded(_ALIGNMENT + len(text)), dtype=np.uint8)
    header[:_ALIGNMENT] = np.array([len(text)], dtype=np.int64).view(np.uint8)
    header[_ALIGNMENT : _ALIGNMENT + len(text)] = np.frombuffer(text, dtype=np.uint8)
    return torch.cat(floats), torch.cat([torch.from_numpy(header).to(token.device), *chunks])


def unpack(flat: Tensor, raw: Tensor, plan_layout: PlanLayout) -> tuple[State, Tensor, LayoutKey]:
    """The inverse of ``pack``; gradients lead back to ``flat``.

    Args:
        flat: Of ``pack``.
        raw: Of ``pack``.
        plan_layout: Computes the layout from the key; the same on every stage.
    """
    key, entries, start = _header(raw)
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
    return State(tensors, plan_layout(*key)), token, key


def _header(raw: Tensor) -> tuple[LayoutKey, list[_Entry], int]:
    """The key, the position of each tensor, and where the first one in ``raw`` begins."""
    head = raw[:_USUAL].cpu().numpy()  # one copy from the device, of the usual length of a header
    end = _ALIGNMENT + int(head[:_ALIGNMENT].view(np.int64)[0])
    if end > len(head):
        head = raw[:end].cpu().numpy()
    key, entries = json.loads(head[_ALIGNMENT:end].tobytes())
    found = [_Entry(name, _TYPES[dtype], tuple(shape), flat) for name, dtype, shape, flat in entries]
    return LayoutKey(*key), found, _rounded(end)


def _bytes_of(tensor: Tensor) -> Tensor:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    missing = _rounded(len(content)) - len(content)
    return torch.cat([content, content.new_zeros(missing)]) if missing else content


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _numel(entry: _Entry) -> int:
    return torch.Size(entry.shape).numel()

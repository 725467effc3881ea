"""When two layers of a chain do the same operations: their forms are equal, and so are those of what they are given.

The form of a layer is everything that its forward and backward pass can depend on but the values of tensors: classes,
shapes and types of parameters and buffers, what is trained, and all other attributes.
"""

from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from engine.estimate.allocations import storage_number
from moe.sparse import SparseFeedForward
from omnivl.chain.chain import ChainLayer
from omnivl.chain.state import State

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_PLACE = frozenset({"name", "level"})
"""Attributes of a layer that say where it is in its stack; only a router's sums carry them on."""

_RATES = frozenset({"drop_path_rate"})
"""Attributes of which operations depend only on whether they are zero."""


def layer_form(layer: ChainLayer) -> Hashable:
    """The form of a layer; one of its own for a layer with routers, which add fields by its name to the state."""
    if any(isinstance(module, SparseFeedForward) for module in layer.modules()):
        return id(layer)
    return _module_form(layer)


def state_form(state: State) -> Hashable:
    """The form of a state: names of the fields, form of each tensor, and the layout itself.

    Elsewhere than on ``meta`` masks and places decide about shapes: of tensors that are not of floating point the form
    is the memory that they are in.
    """
    return id(state.layout), tuple((name, _tensor_form(one), _values_of(one)) for name, one in state.items())


def _values_of(tensor: Tensor) -> int | None:
    return None if tensor.is_meta or tensor.is_floating_point() else storage_number(tensor)


def _module_form(module: nn.Module) -> Hashable:
    place = _PLACE if isinstance(module, ChainLayer) else frozenset[str]()
    attributes = {name: one for name, one in vars(module).items() if name not in _OF_EVERY_MODULE | place}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if isinstance(module, ChainLayer):
        names = {id(one): name for name, one in module.named_parameters()}
        attributes["copies"] = tuple((names.get(number), dtype) for number, dtype in module.copies.asked)
    return (
        type(module),
        tuple((name, _tensor_form(tensor)) for name, tensor in tensors),
        tuple((name, one > 0 if name in _RATES else _form(one)) for name, one in attributes.items()),
        tuple((name, _module_form(child)) for name, child in module.named_children()),
    )


def _tensor_form(tensor: Tensor) -> Hashable:
    memory = tensor.untyped_storage().nbytes()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.requires_grad, memory


def _form(value: Any) -> Hashable:
    """The form of an attribute: its value, where that is known to say everything; else its identity."""
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, Tensor):
        return _tensor_form(value)
    if isinstance(value, nn.Module):
        return _module_form(value)
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), *map(_form, value)
    if isinstance(value, Mapping):
        return type(value), *((_form(name), _form(one)) for name, one in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), *(_form(getattr(value, one.name)) for one in fields(value))
    return id(value)

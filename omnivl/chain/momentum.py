"""Momentum (EMA) twins: modules that follow another module's weights and never get a gradient.

Source: He et al., MoCo, arXiv 1911.05722, eq. 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

LocalStorage = Callable[[nn.Parameter], Tensor]
"""The part of a parameter that this process stores. Sharded hosts hand in their own."""


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """The local storage of a parameter that is not sharded: all of it."""
    return parameter.data


@torch.no_grad()
def ema_update_(twin: nn.Module, online: nn.Module, decay: float, storage: LocalStorage = whole_parameter) -> None:
    """Moves every parameter of ``twin`` in place to ``decay * twin + (1 - decay) * online``; buffers are copied.

    Args:
        twin: The follower; same structure as ``online``.
        online: The module that is trained.
        decay: 1 leaves the twin where it is, 0 copies.
        storage: Returns this process' part of a parameter. Twin and online must be sharded in the same way.
    """
    pairs = list(zip(twin.named_parameters(), online.named_parameters(), strict=True))
    targets, sources = [], []
    for (twin_name, twin_parameter), (name, parameter) in pairs:
        assert twin_name == name, f"twin has {twin_name} where the online module has {name}"
        target, source = storage(twin_parameter), storage(parameter)
        assert target.shape == source.shape, f"{name}: twin is stored as {target.shape}, online as {source.shape}"
        targets.append(target)
        sources.append(source.to(device=target.device, dtype=target.dtype))
    torch._foreach_lerp_(targets, sources, 1.0 - decay)
    for target, source in zip(twin.buffers(), online.buffers(), strict=True):
        target.copy_(source)


def frozen_twin(twin: nn.Module, online: nn.Module) -> nn.Module:
    """Makes a freshly built ``twin`` an exact, gradient-free copy of ``online``; returns it."""
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    ema_update_(twin, online, decay=0.0)
    return twin

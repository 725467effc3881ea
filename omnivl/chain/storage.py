"""Storage for a layer that was built on the meta device: every tensor stays what it is to all that refer to it."""

import torch
from torch import nn

from moe.routers.base import Router


@torch.no_grad()
def give_storage(part: nn.Module, device: torch.device) -> None:
    """Gives the parameters and buffers of a part of a chain storage. Zeros fill it, for somebody else to overwrite.

    Values that no file and no other process has, which experts a modality may go to, are what they would be had the
    part been built with storage.

    Args:
        part: Built on the meta device; changed in place, so that shared parameters stay shared.
        device: Where it gets storage.
    """
    for parameter in part.parameters():
        filled = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
        vars(filled).update(vars(parameter))
        torch.utils.swap_tensors(parameter, filled)  # type: ignore[no-untyped-call]
    for buffer in part.buffers():
        zeros = torch.zeros_like(buffer, device=device)
        torch.utils.swap_tensors(buffer, zeros)  # type: ignore[no-untyped-call]
    for module in part.modules():
        if isinstance(module, Router):
            module.restore_allowed()

"""Activations that are not kept for the backward pass, but computed a second time in it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(wanted: bool, function: Callable[..., Result], *inputs: Any) -> Result:
    """Calls a function; where it is wanted and a graph is built, only its inputs are kept for the backward pass.

    Source: Chen et al., arXiv 1604.06174, section 4.1.

    Args:
        wanted: False calls the function as it is.
        function: Draws from torch's generators at most, whose states are restored: router noise and dropout come out as
            they were.
        inputs: Anything; gradients go to the tensors among them, not to tensors within other objects.
    """
    if wanted and torch.is_grad_enabled():
        result: Result = checkpoint(function, *inputs, use_reentrant=False)
        return result
    return function(*inputs)

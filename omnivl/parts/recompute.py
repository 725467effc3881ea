"""Recomputation of activations in the backward pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from moe.working import with_working_copies

Result = TypeVar("Result")


def recomputed(wanted: bool, function: Callable[..., Result], *inputs: Any, whole: bool = False) -> Result:
    """Calls a function; if ``wanted`` and a graph is built, only its inputs are kept for the backward pass.

    Source: Chen et al., arXiv 1604.06174, section 4.1.

    Args:
        wanted: False calls the function as it is.
        function: May draw from torch's generators only; their states are restored, so that router noise and dropout are
            the same in both runs.
        inputs: Anything; gradients go to the tensors among them, not to tensors within other objects.
        whole: Whether the function is all of a layer, so that nothing else keeps its parameters' copies.
    """
    if wanted and torch.is_grad_enabled():
        result: Result = checkpoint(with_working_copies(function, anew=whole), *inputs, use_reentrant=False)
        return result
    return function(*inputs)

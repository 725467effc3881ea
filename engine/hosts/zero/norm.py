"""One wait of the host in a step of DeepSpeed's ZeRO: the gradient's norm is read back once, with all that is read."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def read_norm_by(optimizer: Any, zero_stage: int, read: Callable[[Tensor], float]) -> None:
    """Has a ZeRO optimizer take the norm of its gradients from ``read``, as a number of the host.

    DeepSpeed waits for the device to ask whether the norm is finite, and once more for every group that it clips.

    Args:
        optimizer: Of stage 1, 2 or 3.
        zero_stage: Which.
        read: Gets the norm on the device, negative or infinite where a gradient was not finite, and returns its value.
            Called once in a step, before any weight is changed.

    Source: DeepSpeed 0.19, ``step`` of ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``.
    """
    if zero_stage == 3:
        groups = optimizer._get_norm_groups
        combine = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups
        optimizer._get_norm_groups = lambda: [_on_host(read(combine(groups())))]
    else:
        norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: _on_host(read(norm()))


def _on_host(value: float) -> Tensor:
    """A scalar that needs no device. It may be multiplied by a tensor on any."""
    return torch.tensor(value, dtype=torch.float32)

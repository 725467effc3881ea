"""Memory of a process on a CPU: what a step frees is kept for the next one."""

import ctypes
import os
from collections.abc import Mapping

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of options in glibc's malloc.h
_LARGEST = (1 << 30, 1 << 25)
"""Bytes of the largest blocks that are kept; earlier versions of glibc take the second at most."""


def keep_freed_memory(device: torch.device, variables: Mapping[str, str] = os.environ) -> bool:
    """Has glibc keep what is freed instead of giving it back to the system, which clears each page that it gives again.

    Activations, gradients and the optimizer's copies are freed and allocated anew in every step. The process stays at
    its greatest size; larger blocks are still given back. Another allocator takes no notice.

    Args:
        device: Where the process computes; nothing is changed beside an accelerator, whose memory torch keeps itself.
        variables: Of the environment. Nothing is changed either where they set glibc's allocator
            (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).

    Returns:
        Whether glibc has taken it.
    """
    chosen = "MALLOC_TRIM_THRESHOLD_" in variables or "MALLOC_MMAP_THRESHOLD_" in variables
    if device.type != "cpu" or chosen or "glibc.malloc" in variables.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)

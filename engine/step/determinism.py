"""Operations that give the same bits in every run (``parallel.deterministic``)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_operations(wanted: bool) -> Iterator[None]:
    """Within the block torch takes deterministic kernels, and warns, with its name, of an operation that has none.

    Args:
        wanted: False changes nothing.

    Source: PyTorch's notes on reproducibility; cuBLAS needs a workspace of a fixed size, set before its first product.
    """
    if not wanted:
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, tunes = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Memory that is written before it is read need not be filled first.
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tunes

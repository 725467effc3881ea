"""The peak floating point operations per second of a device, to which achieved rates are compared."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
"""Seconds since some moment."""

_KNOWN_BF16: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L4", 121e12),
    ("A6000", 155e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
"""Dense bf16 tensor-core peaks with fp32 accumulation, from data sheets (no sparsity). First match wins."""


@dataclass(frozen=True)
class Peak:
    """A device's peak.

    Attributes:
        flops: Floating point operations per second of one process' device.
        source: ``data sheet`` or ``measured``.
    """

    flops: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of one process' device at matrix products.

    A CPU is measured, since its data sheet does not account for shared cores and changing clocks: called on every
    process of a machine at the same time, the function gives each its share. A GPU that is not in the table is measured
    too, and so is any GPU at fp32, whose data-sheet peak depends on whether TF32 is on.

    Args:
        device: Where the chain computes.
        dtype: Data type in which it computes.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return Peak(known, "data sheet")
    return Peak(measured_peak(device, dtype), "measured")


def known_peak(name: str) -> float | None:
    """Dense bf16 peak of a GPU by its marketing name, in FLOP/s; None for an unknown one."""
    upper = name.upper()
    return next((flops for key, flops in _KNOWN_BF16 if _has_word(upper, key)), None)


def measured_peak(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.8, clock: Clock = time.perf_counter
) -> float:
    """Best rate of a square matrix product, in FLOP/s.

    Args:
        device: Where to multiply.
        dtype: Of the matrices.
        seconds: How long to try.
        clock: Seconds that a product takes.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a, b = a.to(device, dtype), b.to(device, dtype)
    best = float("inf")
    began = time.perf_counter()
    repeats = 0
    with torch.inference_mode():
        while repeats < 3 or time.perf_counter() - began < seconds:
            before = clock()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, clock() - before)
            repeats += 1
    return 2 * size**3 / best


def _has_word(name: str, key: str) -> bool:
    """Whether ``key`` stands in ``name`` as whole words: ``L4`` must not match ``L40S``."""
    start = name.find(key)
    while start >= 0:
        end = start + len(key)
        if not name[start - 1 : start].isalnum() and not name[end : end + 1].isalnum():
            return True
        start = name.find(key, start + 1)
    return False

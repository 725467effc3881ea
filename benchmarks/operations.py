"""The time of a step by category of operations, from torch's profiler."""

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Step

OUTSIDE = "outside operations"
"""On a CPU: Python, autograd's bookkeeping, the profiler. On a GPU: idle time."""

OTHER = "other"

CATEGORIES: Sequence[tuple[str, tuple[str, ...]]] = (
    ("attention products", ("bmm", "baddbmm", "scaled_dot_product", "flash_attention", "efficient_attention")),
    ("matrix products", ("mm", "addmm", "linear", "matmul", "linear_pointwise", "convolution", "addmv", "mv", "dot")),
    ("softmax and losses", ("softmax", "nll_loss", "cross_entropy", "logsumexp", "smooth_l1", "binary_cross_entropy")),
    ("normalisation", ("layer_norm",)),
    ("gelu", ("gelu",)),
    ("optimizer, clipping, momentum", ("fused_adam", "foreach", "lerp", "linalg_vector_norm", "Optimizer.")),
    (
        "data movement",
        (
            *("copy", "cat", "clone", "contiguous", "index", "gather", "scatter", "fill", "zero", "embedding", "stack"),
            *("select", "slice", "narrow", "split", "to", "nonzero", "repeat", "Memcpy", "Memset", "pad", "roll"),
        ),
    ),
    (
        "elementwise and sums",
        (
            *(
                "add",
                "sub",
                "mul",
                "div",
                "neg",
                "exp",
                "log",
                "sqrt",
                "rsqrt",
                "pow",
                "clamp",
                "where",
                "masked",
                "sum",
            ),
            *("mean", "norm", "std", "var", "max", "min", "eq", "ne", "lt", "gt", "le", "ge", "bitwise", "logical"),
            *("any", "all", "tril", "triu", "arange", "cumsum", "sort", "argmax", "isfinite", "abs", "sigmoid"),
        ),
    ),
)
"""Categories by words in an operation's name, tried from the first to the last."""


def category(name: str) -> str:
    """The category of an operation.

    Args:
        name: As the profiler gives it, e.g. ``aten::addmm`` or ``autograd::engine::evaluate_function: MulBackward0``.
    """
    short = name.rpartition("::")[2].strip("_")
    for title, keys in CATEGORIES:
        if any(_says(short, key) for key in keys):
            return title
    return OTHER


def _says(name: str, key: str) -> bool:
    """Whether ``key`` stands in ``name`` as whole words: ``mm`` must not match ``bmm``, nor ``to`` ``topk``."""
    return f"_{key}_" in f"_{name}_" or (name.startswith(key) and (key.endswith((".", "_")) or "_" in key))


def shares_of_time(step: Step, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Shares of a step's time by category, largest first, adding up to 1.

    Args:
        step: A warmed-up step.
        device: Where it computes.
        repeats: Steps to profile.
    """
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints a line at each start and stop
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = 1e6 * (time.perf_counter() - start)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type.name != "CPU":
            continue  # kernels: their time is counted with the operation that started them
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu or event.key.startswith(("aten::", "mkldnn::", "Optimizer.")):
            times[category(event.key)] += taken
    return as_shares(times, wall)


def as_shares(microseconds: Mapping[str, float], wall: float) -> dict[str, float]:
    """Shares of the wall time, largest first, with the remainder as ``OUTSIDE``.

    Args:
        microseconds: By category.
        wall: Microseconds in all; the sum of parallel operations may exceed it.
    """
    whole = max(wall, sum(microseconds.values()))
    shares = {name: taken / whole for name, taken in microseconds.items() if taken > 0}
    shares[OUTSIDE] = max(0.0, 1.0 - sum(shares.values()))
    return dict(sorted(shares.items(), key=lambda item: item[1], reverse=True))

"""Operations that a compiler joins, counted by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.estimate.fused import count_passes
from engine.estimate.layers import accelerator_kernels
from engine.estimate.operations import OperationCounter, Operations

UNIT = 64 * 32 * 2
"""Bytes of ``[64, 32]`` in bf16."""


def _fused(run: Callable[[], Tensor]) -> tuple[Operations, Operations]:
    with accelerator_kernels():
        return count_passes(run, fused=True)


def _bytes(operations: Operations) -> float:
    return sum(count * one.bytes for one, count in operations.items())


def _tensor(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def test_elementwise_operations_are_one_kernel() -> None:
    """Forward reads x and writes the result; backward reads its gradient and x, from which all else is made again."""
    x = _tensor(64, 32)
    forward, backward = _fused(lambda: (x.float().sigmoid() * 2.0).to(torch.bfloat16))
    assert sum(forward.values()) == 1 and _bytes(forward) == 2 * UNIT
    assert sum(backward.values()) == 1 and _bytes(backward) == 3 * UNIT
    eager = OperationCounter()
    with eager:
        (x.float().sigmoid() * 2.0).to(torch.bfloat16)
    assert _bytes(eager.found) == (3 + 4 + 4 + 3) * UNIT  # a cast, two operations in fp32, a cast


def test_products_keep_kernels_of_their_own_and_end_others() -> None:
    """Product, gated unit, product: what lies between reads the first result and writes what the second reads."""
    x, first, second = _tensor(64, 32), _tensor(32, 64), _tensor(32, 32)

    def run() -> Tensor:
        gate, up = (x @ first).chunk(2, -1)
        return (F.silu(gate) * up) @ second

    forward, backward = _fused(run)
    between = [one for one in forward if one.kind == "other"]
    assert len(between) == 1 and between[0].bytes == 3 * UNIT
    assert sum(count for one, count in forward.items() if one.kind == "product") == 2
    # Backward: the gradient of the joined halves from its gradient and the halves, 1 + 2 read, 2 written.
    assert sum(count for one, count in backward.items() if one.kind == "product") == 4
    assert _bytes({one: count for one, count in backward.items() if one.kind == "other"}) == 5 * UNIT


def test_a_tensor_that_a_product_reads_is_written_once() -> None:
    """The sum is returned, and the norm of it is read by a product: one kernel reads two tensors and writes two."""
    x, y, weight = _tensor(64, 32), _tensor(64, 32), _tensor(32, 32)
    forward, _ = _fused(lambda: (h := x + y) + F.layer_norm(h, (32,)) @ weight)
    sizes = sorted(one.bytes for one in forward if one.kind == "other")
    statistics = 2 * 64 * 2  # mean and deviation, kept for the backward pass
    assert sizes[0] == 3 * UNIT  # the last sum
    assert sizes[1] == pytest.approx(4 * UNIT, abs=2 * statistics)


def test_recomputed_operations_are_counted_again() -> None:
    block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to("meta", torch.bfloat16)
    x = _tensor(64, 32)
    once = _fused(lambda: block(x))
    again = _fused(lambda: checkpoint(block, x, use_reentrant=False))
    flops = [sum(count * one.flops for one, count in ops.items()) for ops in (*once, *again)]
    assert flops[2] == flops[0]
    assert flops[1] + flops[0] / 2 <= flops[3] <= flops[1] + flops[0]  # the last product's result is not needed

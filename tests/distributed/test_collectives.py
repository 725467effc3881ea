"""The gather over replicas: its result and its gradient."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.processes.collectives import broadcast_from_first, broadcast_together, make_gather

pytestmark = pytest.mark.distributed


def join_everything() -> dict[str, Any]:
    """Worker: joins, sums and broadcasts small tensors; each replica weighs the joined rows differently."""
    gather = make_gather()
    rank = gather.replica
    x = torch.tensor([[1.0 + rank, 2.0], [3.0, 4.0 + rank]], requires_grad=True)
    joined = gather.join(x)
    weights = torch.arange(1.0, 9.0).view(4, 2) * (rank + 1)
    (joined * weights).sum().backward()
    count = torch.tensor([rank + 1])
    total = gather.total(count)
    flags = torch.tensor([rank == 0, True])
    broadcast_from_first(flags)
    return {
        **{"joined": joined.detach(), "gradient": x.grad, "total": total, "count": count, "flags": flags},
        "bools": gather.join(torch.tensor([rank == 1])),
        "integers": gather.join(torch.tensor([rank])),
        "bf16": _bf16_gradient(gather),
    }


def _bf16_gradient(gather: Any) -> torch.Tensor:
    x = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    (gather.join(x) * (1.0 if gather.replica == 0 else 2**-9)).sum().backward()
    assert x.grad is not None
    return x.grad


def broadcast_many(together: int) -> dict[str, Any]:
    """Worker: tensors of many types, of which replica 0's are everyone's; and how many collectives that took."""
    rank, usual, sizes = dist.get_rank(), dist.broadcast, []

    def counted(tensor: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        sizes.append(tensor.nbytes)
        return usual(tensor, *inputs, **options)

    tensors = [
        torch.full((3, 5), 1.5 + rank),
        torch.tensor(7 - rank),
        torch.empty(0, 4),
        torch.tensor([True, False, rank == 0]),
        torch.full((40,), 2.0 - rank, dtype=torch.bfloat16),
        torch.full((2,), 9 * (1 - rank), dtype=torch.uint8),
    ]
    dist.broadcast = counted
    try:
        broadcast_together(tensors, together=together)
    finally:
        dist.broadcast = usual
    return {"tensors": tensors, "sizes": sizes}


@pytest.mark.parametrize(
    ("together", "sizes"),
    [(1 << 20, [60 + 8 + 3 + 80 + 2]), (70, [68, 3, 80, 2]), (1, [60, 8, 3, 80, 2])],
)
def test_what_is_broadcast_together_is_replica_0_s(run_distributed: Any, together: int, sizes: list[int]) -> None:
    first, second = run_distributed(broadcast_many, processes=2, together=together)
    assert first["sizes"] == second["sizes"] == sizes
    for one, other in zip(first["tensors"], second["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert [tensor.flatten().tolist()[:1] for tensor in first["tensors"]] == [[1.5], [7], [], [True], [2.0], [9]]


PLACES = [[8, 0, 3, 3, 5], [1, 2], [4, 4, 4, 4, 0, 7, 2, 6]]
"""Of nine joined rows, three on each replica: the second asks for rows of the first alone, which many want."""


def fetch_rows() -> dict[str, Any]:
    """Worker: some of the joined rows, fetched and picked from all, in two precisions."""
    gather, found = make_gather(), dict[str, Any]()
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(gather.replica)
        own = torch.randn(3, 2, 4).to(dtype)
        mask, rows = own[:, 0] > 0, torch.tensor(PLACES[gather.replica])
        weights = torch.randn(len(rows), 2, 4).to(dtype)
        made = []
        for fetched in (True, False):
            x = own.clone().requires_grad_()
            some, masks = gather.fetch([x, mask], rows) if fetched else (gather.join(x)[rows], gather.join(mask)[rows])
            (some * weights).sum().backward()
            made.append({"some": some.detach(), "masks": masks, "gradient": x.grad})
        found[str(dtype)] = made
    return found


def test_fetched_rows_are_those_of_the_joined_tensor_forward_and_gradient(run_distributed: Any) -> None:
    for found in run_distributed(fetch_rows, processes=3):
        for dtype, (fetched, picked) in found.items():
            assert torch.equal(fetched["some"], picked["some"])
            assert fetched["masks"].dtype == torch.bool
            assert torch.equal(fetched["masks"], picked["masks"])
            # The joined gradient is rounded where a replica picked a row several times, the fetched one is not.
            close = {"rtol": 1e-6, "atol": 1e-6} if "64" in dtype else {"rtol": 2e-2, "atol": 4e-2}
            torch.testing.assert_close(fetched["gradient"], picked["gradient"], **close)


def test_joins_in_replica_order_and_sums_gradients_before_slicing(run_distributed: Any) -> None:
    first, second = run_distributed(join_everything, processes=2)
    rows = [[1.0, 2.0], [3.0, 4.0], [2.0, 2.0], [3.0, 5.0]]
    for rank in (first, second):
        assert rank["joined"].tolist() == rows
        assert rank["bools"].tolist() == [False, True]
        assert rank["integers"].tolist() == [0, 1]
        assert rank["total"].tolist() == [3]
        assert rank["flags"].tolist() == [True, True]
    assert (first["count"].tolist(), second["count"].tolist()) == ([1], [2])
    # Weights are 1..8 on replica 0 and twice that on replica 1: their sum is 3 * (1..8), cut in two.
    assert first["gradient"].tolist() == [[3.0, 6.0], [9.0, 12.0]]
    assert second["gradient"].tolist() == [[15.0, 18.0], [21.0, 24.0]]
    assert first["bf16"].dtype == torch.bfloat16

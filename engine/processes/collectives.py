"""Collectives of the chain over data-parallel replicas, and of experts over their parts, by ``torch.distributed``.

Shapes: B rows of one replica, R replicas.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omnivl.chain.gather import Gather, LocalGather

# PyTorch has renamed the collective; versions with the new name warn at every call of the old one.
all_gather_rows = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_rows = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_TOGETHER = 64 << 20
"""Bytes that are broadcast by one collective."""


class ProcessGroupGather:
    """``omnivl.chain.gather.Gather`` over the replicas of a process group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Remembers the group; None is the default group of all processes."""
        self._group = group
        self.replicas = dist.get_world_size(group)
        self.replica = dist.get_rank(group)

    def join(self, tensor: Tensor) -> Tensor:
        """Concatenates ``[B, ...]`` of every replica, in replica order, to ``[R * B, ...]``.

        The gradient is summed over replicas before this replica's rows are taken from it: every replica's loss depends
        on every replica's rows. With gradients averaged over replicas this equals one process on the joined batch.
        """
        if tensor.requires_grad and torch.is_grad_enabled():
            joined: Tensor = _Join.apply(tensor, self._group)  # type: ignore[no-untyped-call]
            return joined
        return _all_gather(tensor, self._group)

    def total(self, tensor: Tensor) -> Tensor:
        """Sums a gradient-free tensor of any shape over the replicas; the argument is not changed."""
        summed = tensor.detach().clone()
        dist.all_reduce(summed, group=self._group)
        return summed

    def share_of_total(self, tensor: Tensor) -> Tensor:
        """This replica's rows of the sum of ``[R * B, ...]`` over the replicas."""
        source = tensor.detach().contiguous()
        share = source.new_empty((len(source) // self.replicas, *source.shape[1:]))
        reduce_scatter_rows(share, source, group=self._group)
        return share

    def trade(self, tensor: Tensor) -> Tensor:
        """``B`` rows of ``[R * B, ...]`` go to each replica, and ``B`` come from each."""
        return trade_rows(tensor, None, None, self._group)

    def fetch(self, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Rows of the joined tensors, each from the replica that holds it; gradients go back there.

        The host waits once, for how many rows each replica sends.
        """
        own, replicas = len(tensors[0]), torch.arange(self.replicas, device=rows.device)
        owner = rows // own
        order = owner.argsort(stable=True)
        wanted_by = (owner == replicas[:, None]).sum(1)
        asked_of = trade_rows(wanted_by, None, None, self._group)
        wanted, asked = torch.stack([wanted_by, asked_of]).tolist()
        places = trade_rows((rows % own)[order], wanted, asked, self._group)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return [
            _Fetch.apply(tensor, places, order, back, wanted, asked, self._group)  # type: ignore[no-untyped-call]
            for tensor in tensors
        ]

    def shift(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Tensors go to the next replica, in a ring; the returned function waits for those of the one before."""
        sent = [tensor.detach().contiguous() for tensor in tensors]
        arrived = [torch.empty_like(tensor) for tensor in sent]
        after, before = (self.replica + 1) % self.replicas, (self.replica - 1) % self.replicas
        sends = [dist.P2POp(dist.isend, one, group=self._group, group_peer=after) for one in sent]
        receives = [dist.P2POp(dist.irecv, one, group=self._group, group_peer=before) for one in arrived]
        works = dist.batch_isend_irecv([*sends, *receives])

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return arrived

        return wait


class ProcessGroupExchange:
    """``moe.experts.exchange.ExpertExchange`` over an expert-parallel process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Remembers the group; its processes hold the parts of every bank in their order."""
        self._group = group
        self.parts = dist.get_world_size(group)
        self.part = dist.get_rank(group)

    def trade_counts(self, counts_PE: Tensor) -> Tensor:  # noqa: N803
        """Row p goes to part p."""
        return trade_rows(counts_PE, None, None, self._group)

    def start_rows(
        self,
        rows_ND: Tensor,  # noqa: N803
        sent: Sequence[int],
        received: Sequence[int],
    ) -> Callable[[], Tensor]:
        """``sent[p]`` rows go to part p; their gradients come back, begun and awaited at the same two places."""
        trade = _Trade(list(sent), list(received), self._group)
        begun = _Begin.apply(rows_ND, trade)  # type: ignore[no-untyped-call]

        def wait() -> Tensor:
            arrived: Tensor = _Await.apply(begun, trade)  # type: ignore[no-untyped-call]
            return arrived

        return wait

    def join(self, tensor: Tensor) -> Tensor:
        """``[E / P, ...]`` of all parts as ``[E, ...]``."""
        return _all_gather(tensor, self._group)


def make_gather(group: dist.ProcessGroup | None = None) -> Gather:
    """The gather of this process: local where there is no process group or only one replica in it."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return LocalGather()
    return ProcessGroupGather(group)


def broadcast_from_first(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Overwrites a tensor on every replica with that of replica 0."""
    broadcast_from(tensor, 0, group)


def broadcast_from(tensor: Tensor, replica: int, group: dist.ProcessGroup | None = None) -> None:
    """Overwrites a tensor on every replica with that of one of them."""
    dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, group=group, group_src=replica)


@torch.no_grad()
def broadcast_together(
    tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None, *, together: int = _TOGETHER
) -> None:
    """Overwrites tensors on every replica with those of replica 0, by one collective for many small ones.

    Args:
        tensors: Contiguous, on one device, on every replica of the same types and sizes in the same order.
        group: The replicas.
        together: Bytes that are put into one buffer; larger tensors are sent as they are.
    """
    waiting: list[Tensor] = []

    def send() -> None:
        if len(waiting) > 1:
            buffer = torch.cat(waiting)
            dist.broadcast(buffer, group=group, group_src=0)
            if dist.get_rank(group) > 0:
                torch._foreach_copy_(waiting, list(torch.split(buffer, [one.numel() for one in waiting])))
        elif waiting:
            dist.broadcast(waiting[0], group=group, group_src=0)
        waiting.clear()

    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if sum(one.numel() for one in waiting) + tensor.nbytes > together:
            send()
        waiting.append(tensor.detach().view(-1).view(torch.uint8))
    send()


class _Join(torch.autograd.Function):
    """All-gather whose backward is reduce-then-slice."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        ctx.rows = tensor.shape[0]
        return _all_gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Summed in fp32: a sum of R bf16 gradients would be less exact than the gradient of the joined batch.
        (gradient,) = gradients
        summed = gradient.to(torch.float32, copy=True).contiguous()
        dist.all_reduce(summed, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return summed[start : start + ctx.rows].to(gradient.dtype), None


class _Fetch(torch.autograd.Function):
    """Sends the rows that other replicas asked for, by ``places``, and puts those that arrive into their order."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        places: Tensor,
        order: Tensor,
        back: Tensor,
        wanted: list[int],
        asked: list[int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(places, order)
        ctx.rows, ctx.wanted, ctx.asked, ctx.group = len(tensor), wanted, asked, group
        return trade_rows(tensor.index_select(0, places), asked, wanted, group).index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (gradient,), (places, order) = gradients, ctx.saved_tensors
        arrived = trade_rows(gradient.index_select(0, order), ctx.wanted, ctx.asked, ctx.group)
        # Summed in fp32, as in ``_Join``.
        exact = torch.promote_types(arrived.dtype, torch.float32)
        summed = arrived.new_zeros((ctx.rows, *arrived.shape[1:]), dtype=exact)
        summed.index_add_(0, places, arrived.to(exact))
        return summed.to(gradient.dtype), None, None, None, None, None, None


class _Trade:
    """An all-to-all of rows that is begun in one place and awaited in another; its gradient is one the other way.

    Attributes:
        sent: Rows that go to each part.
        received: Rows that come from each.
        group: The parts.
        on_its_way: Waits for what was begun last, and returns it.
    """

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.on_its_way: Callable[[], Tensor] | None = None

    def begin(self, rows: Tensor, *, back: bool) -> None:
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        self.on_its_way = start_rows(rows, sent, received, self.group)

    def arrived(self) -> Tensor:
        assert self.on_its_way is not None, "nothing was begun"
        wait, self.on_its_way = self.on_its_way, None
        return wait()


class _Begin(torch.autograd.Function):
    """Begins the exchange. Its result, an empty tensor, orders ``_Await`` behind it in the backward pass as well.

    What is computed between the two runs while rows travel. In the backward pass too: autograd runs what came later in
    the forward pass first, so that ``_Await`` begins, what lay between is computed, and ``_Begin`` waits.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trade: _Trade) -> Tensor:
        ctx.trade = trade
        trade.begin(rows, back=False)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.trade.arrived(), None


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, trade: _Trade) -> Tensor:
        ctx.trade = trade
        return trade.arrived()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.trade.begin(gradients[0], back=True)
        return gradients[0].new_empty(0), None


def start_rows(
    tensor: Tensor, sent: list[int] | None, received: list[int] | None, group: dist.ProcessGroup | None
) -> Callable[[], Tensor]:
    """Begins an all-to-all of rows, without a gradient. Booleans are sent as bytes, which every backend supports.

    Args:
        tensor: Rows in the order of the replicas to which they go.
        sent: How many go to each replica; None: equally many to each.
        received: How many come from each; None as ``sent``.
        group: The replicas.

    Returns:
        Waits, and returns the rows that came, in the order of the replicas.
    """
    source = tensor.detach().contiguous()
    if source.dtype == torch.bool:
        wait_for_bytes = start_rows(source.view(torch.uint8), sent, received, group)
        return lambda: wait_for_bytes().view(torch.bool)
    arrived = source.new_empty((len(source) if received is None else sum(received), *source.shape[1:]))
    work = dist.all_to_all_single(arrived, source, received, sent, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return arrived

    return wait


def trade_rows(
    tensor: Tensor, sent: list[int] | None, received: list[int] | None, group: dist.ProcessGroup | None
) -> Tensor:
    """``start_rows``, awaited."""
    return start_rows(tensor, sent, received, group)()


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[B, ...]`` of every replica as ``[R * B, ...]``. Booleans are sent as bytes, which every backend supports."""
    source = tensor.detach().contiguous()
    if source.dtype == torch.bool:
        return _all_gather(source.view(torch.uint8), group).view(torch.bool)
    joined = source.new_empty((dist.get_world_size(group) * source.shape[0], *source.shape[1:]))
    all_gather_rows(joined, source, group=group)
    return joined

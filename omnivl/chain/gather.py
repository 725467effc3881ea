"""The interface through which a layer communicates with other data-parallel replicas, without knowing of ranks.

The engine passes such an object to the chain. A single process uses ``LocalGather``.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class ReplicaError(Exception):
    """Another replica has failed in something that all have to do before they can go on; that one raises the cause."""


class Gather(Protocol):
    """Joins tensors over the data-parallel replicas, in replica order."""

    @property
    def replicas(self) -> int:
        """Number of data-parallel replicas."""

    @property
    def replica(self) -> int:
        """This replica's index."""

    def join(self, tensor: Tensor) -> Tensor:
        """Concatenates ``[B, ...]`` of every replica to ``[replicas * B, ...]``; equal shapes everywhere.

        The backward pass sums the gradient over all replicas before it slices out this replica's share, so that with
        gradients averaged over replicas the result equals one process that holds the joined batch.
        """

    def total(self, tensor: Tensor) -> Tensor:
        """Sums a gradient-free tensor over the replicas."""

    def share_of_total(self, tensor: Tensor) -> Tensor:
        """This replica's rows ``[B, ...]`` of the sum over the replicas of gradient-free ``[replicas * B, ...]``."""

    def trade(self, tensor: Tensor) -> Tensor:
        """Sends ``B`` rows of a gradient-free ``[replicas * B, ...]`` to each replica, in replica order.

        Returns:
            What each replica has sent here, ``[replicas * B, ...]`` in replica order.
        """

    def fetch(self, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Some rows of what ``join`` would give, without the others: each comes from the replica that holds it.

        Args:
            tensors: ``[B, ...]``, equal shapes on every replica. Gradients are added up where the rows came from.
            rows: int64 ``[n]``, places in the joined tensors, as many as wanted, on each replica others.

        Returns:
            ``[n, ...]`` of each tensor.
        """

    def shift(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends gradient-free tensors to the next replica, the last one's to the first.

        Returns:
            A function that waits for those of the replica before, of equal shapes. The sent tensors must not be changed
            before it has returned.
        """


class LocalGather:
    """One replica: joining is the identity."""

    replicas = 1
    replica = 0

    def join(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def share_of_total(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def trade(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def fetch(self, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """The rows."""
        return [tensor.index_select(0, rows) for tensor in tensors]

    def shift(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """The tensors themselves."""
        return lambda: list(tensors)


def together(gather: Gather, device: torch.device, action: Callable[[], Result]) -> Result:
    """Runs an action on every replica, which does not communicate, and fails on all of them if it fails on one.

    If only one raised, the others would wait for it in the next collective.

    Args:
        gather: The replicas.
        device: Where its tensors are.
        action: May give each replica something else.

    Raises:
        Exception: Whatever the action raises.
        ReplicaError: It raised on another replica.
    """
    if gather.replicas == 1:
        return action()
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failed = int(gather.total(torch.tensor(int(error is not None), device=device)))
    if error is not None:
        raise error
    if failed:
        raise ReplicaError(f"{failed} of {gather.replicas} replicas have failed")
    return result

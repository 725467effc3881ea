"""The interface through which a layer communicates with other data-parallel replicas, without knowing of ranks.

The engine passes such an object to the chain. A single process uses ``LocalGather``.
"""

from typing import Protocol

from torch import Tensor


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

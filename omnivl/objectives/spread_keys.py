"""The keys of a batch that is spread over replicas, and how what is made of them comes home.

Keys of other replicas are joined where that is little. Otherwise they visit in a ring, block by block; the sums and
gradients that replicas make of a block follow it and arrive, added up, at the replica that the block came from.

Shapes: B samples of this replica, R replicas, J = R * B samples of the joined batch, n keys of a block, P projection
size, M embeddings of a sample that has several.

Source: the ring as in Liu et al., Ring attention, arXiv 2310.01889.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from omnivl.chain.gather import Gather

RING_BYTES = 2**26
"""Joined keys of at most so many bytes are gathered at once; more of them visit in a ring."""


@dataclass(frozen=True)
class KeyBlock:
    """Some keys, and what holds for all queries alike.

    Attributes:
        keys: ``[n, P]`` or ``[n, M, P]``.
        identity: int64 ``[n]``.
        first: Index of the first key in the joined batch; None for old keys.
        valid: Bool ``[n]``; None: all.
        left_out: Those that are not valid; None: none.
        log_weights: Natural logs of the keys' weights as negatives ``[n]``, or one for all; None: all 0.
        beside: What came with the keys, ``[n, ...]``.
    """

    keys: Tensor
    identity: Tensor
    first: int | None = None
    valid: Tensor | None = None
    left_out: Tensor | None = None
    log_weights: Tensor | float | None = None
    beside: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """Indices in the joined batch, int64 ``[n]``."""
        assert self.first is not None
        return torch.arange(self.first, self.first + len(self.keys), device=self.keys.device)


class SpreadKeys:
    """The embeddings of a batch that is spread over replicas, of one modality."""

    def __init__(self, own: Tensor, identity: Tensor, gather: Gather, ring: bool | None = None) -> None:
        """Keys of this replica, and how to reach the others'.

        Args:
            own: fp32 ``[B, P]`` or ``[B, M, P]``, L2-normalised; equally many on every replica.
            identity: int64 ``[B]``.
            gather: The replicas.
            ring: Whether blocks go round; None: where joined keys are larger than ``RING_BYTES``.
        """
        self.own, self.identity, self.gather, self._ring = own, identity, gather, ring
        large = own.nbytes * gather.replicas > RING_BYTES
        self._in_ring = gather.replicas > 1 and (large if ring is None else ring)
        self._joined_identity = cache(lambda: gather.join(identity))
        self._joined: KeyBlock | None = None

    @classmethod
    def both(
        cls, visual: Tensor, text: Tensor, identity: Tensor, gather: Gather, ring: bool | None = None
    ) -> tuple["SpreadKeys", "SpreadKeys"]:
        """Visual and textual keys of the same samples, whose identities are joined once."""
        first = cls(visual, identity, gather, ring)
        return first, first.of_same_samples(text)

    def of_same_samples(self, own: Tensor) -> "SpreadKeys":
        """Other embeddings of the same samples, whose identities are not joined again."""
        made = SpreadKeys(own, self.identity, self.gather, self._ring)
        made._joined_identity = self._joined_identity
        return made

    def joined(self) -> KeyBlock:
        """The keys of all replicas at once. Called by every replica."""
        if self._joined is None:
            self._joined = KeyBlock(self.gather.join(self.own.detach()), self._joined_identity(), 0)
        return self._joined

    @property
    def first(self) -> int:
        """Index of the first own key in the joined batch."""
        return self.gather.replica * len(self.own)

    @property
    def count(self) -> int:
        """J."""
        return self.gather.replicas * len(self.own)

    def blocks(self, beside: Tensor | None = None) -> Iterator[KeyBlock]:
        """All keys, without gradient, each once. Called by every replica.

        Args:
            beside: What travels with the own keys, ``[B, ...]``.
        """
        gather = self.gather
        if not self._in_ring:
            whole = self.joined()
            joined = None if beside is None else gather.join(beside)
            yield KeyBlock(whole.keys, whole.identity, whole.first, beside=joined)
            return
        block = [self.own.detach(), self.identity] + ([] if beside is None else [beside])
        for hop in range(gather.replicas):
            arriving = gather.shift(block) if hop < gather.replicas - 1 else None
            first = (gather.replica - hop) % gather.replicas * len(self.own)
            yield KeyBlock(block[0], block[1], first, beside=None if beside is None else block[2])
            block = block if arriving is None else arriving()

    def sum_gradients(self, of_blocks: Iterator[Tensor]) -> Tensor:
        """The gradient of the own keys, summed over the replicas. Called by every replica.

        Args:
            of_blocks: This replica's part of the gradient of each block, in the order of ``blocks``.
        """
        if self._in_ring:
            return self._round(of_blocks, lambda gradient, earlier: gradient.add_(earlier))
        (gradient,) = of_blocks
        return self.gather.share_of_total(gradient)

    def merge(self, of_blocks: Iterator[Tensor], merged: Callable[[Tensor], Tensor]) -> Tensor:
        """What all replicas have found about the own keys, ``[B, ...]``. Called by every replica.

        Args:
            of_blocks: What this replica has found about the keys of each block, ``[n, ...]``, in their order.
            merged: Makes one ``[n, ...]`` of several, ``[S, n, ...]``.
        """
        if self._in_ring:
            return self._round(of_blocks, lambda found, earlier: merged(torch.stack([found, earlier])))
        (found,) = of_blocks
        return merged(self.gather.trade(found).view(self.gather.replicas, -1, *found.shape[1:]))

    def _round(self, of_blocks: Iterator[Tensor], add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        arriving: Callable[[], list[Tensor]] | None = None
        for made in of_blocks:
            # Of the replicas that this block has visited before.
            arriving = self.gather.shift([made if arriving is None else add(made, arriving()[0])])
        assert arriving is not None
        return arriving()[0]


@dataclass(frozen=True)
class OldKeys:
    """Keys without gradient that every replica has, of one modality: a queue.

    Attributes:
        keys: fp32 ``[Q, P]``.
        identity: int64 ``[Q]``.
        valid: Bool ``[Q]``; others do not exist.
        log_weights: Log of each key's weight as a negative ``[Q]``; None: all 1.
    """

    keys: Tensor
    identity: Tensor
    valid: Tensor
    log_weights: Tensor | None = None

    def block(self) -> KeyBlock:
        """All of them."""
        return KeyBlock(self.keys, self.identity, None, self.valid, self._left_out, self.log_weights)

    @cached_property
    def _left_out(self) -> Tensor:
        return ~self.valid

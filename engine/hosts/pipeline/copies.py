"""Keeps the copies of a layer that several pipeline stages have equal.

Before gradients are averaged over replicas, every copy sends its gradient to the layer's owner, which adds it to its
own, and drops it. After that the owner's layer is treated like any other: the gradient is averaged, counts once in the
norm, is clipped, and updates the weights. Then the owner sends the weights to the copies. Sums that layers keep for
``after_step`` (``ChainLayer.step_sums``) are sent in the same way.

All processes make the transfers of all layers in the same order, so that there is no deadlock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.hosts.pipeline.division import Division
from omnivl.chain.chain import Chain, ChainLayer


@dataclass(frozen=True)
class _Tied:
    """A layer of which this stage has a copy or is the owner.

    Attributes:
        layer: The layer in this process.
        owner: The stage that trains it.
        others: The stages that only have copies.
    """

    layer: ChainLayer
    owner: int
    others: tuple[int, ...]


class Copies:
    """The tied layers of this process' stage, and the transfers between their copies in one pipeline replica."""

    def __init__(self, chain: Chain, division: Division, stage: int, pipe_group: dist.ProcessGroup) -> None:
        """Finds the tied layers.

        Args:
            chain: In its final form, with equal copies.
            division: Which stages have which layers.
            stage: This process' stage.
            pipe_group: The stages of this replica, first to last.
        """
        self._stage, self._group = stage, pipe_group
        self._tied: list[_Tied] = []
        for name in division.tied:
            stages, owner = division.stages_of[name], division.owners[name]
            if stage in stages:
                layer: ChainLayer = chain.get_submodule(name)  # type: ignore[assignment]
                self._tied.append(_Tied(layer, owner, tuple(one for one in stages if one != owner)))

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Adds up gradients and sums of a step at the owners of the layers; copies have none afterwards."""
        for tied in self._tied:
            trained = _trained(tied.layer)
            sums = tied.layer.step_sums()
            if tied.owner != self._stage:
                given = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
                self._send([*given, *sums], tied.owner)
                for parameter in trained:
                    parameter.grad = None
                continue
            for other in tied.others:
                arrived = self._receive([*trained, *sums], other)
                for parameter, gradient in zip(trained, arrived, strict=False):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                for mine, theirs in zip(sums, arrived[len(trained) :], strict=True):
                    mine.add_(theirs)

    def spread_weights(self) -> None:
        """Sends trained weights and the step's sums from the owners to the copies after a step."""
        for tied in self._tied:
            self._spread(tied, [*_trained(tied.layer), *tied.layer.step_sums()])

    def spread_all(self) -> None:
        """Sends all tensors from the owners to the copies after a file was read: twins and buffers too."""
        for tied in self._tied:
            self._spread(tied, list(tied.layer.state_dict().values()))

    @torch.no_grad()
    def _spread(self, tied: _Tied, tensors: Sequence[Tensor]) -> None:
        if tied.owner == self._stage:
            for other in tied.others:
                self._send(tensors, other)
        else:
            for tensor, arrived in zip(tensors, self._receive(tensors, tied.owner), strict=True):
                tensor.copy_(arrived)

    def _send(self, tensors: Sequence[Tensor], stage: int) -> None:
        for number in _types(tensors):
            together = torch.cat([one.detach().flatten() for one in tensors if one.dtype == number])
            dist.send(_as_bytes(together), group=self._group, group_dst=stage)

    def _receive(self, tensors: Sequence[Tensor], stage: int) -> list[Tensor]:
        """Receives tensors of these shapes from a process."""
        found: list[Tensor] = [torch.empty(0)] * len(tensors)
        for number in _types(tensors):
            places = [place for place, one in enumerate(tensors) if one.dtype == number]
            sizes = [tensors[place].numel() for place in places]
            together = torch.empty(sum(sizes), dtype=number, device=tensors[places[0]].device)
            dist.recv(_as_bytes(together), group=self._group, group_src=stage)
            for place, piece in zip(places, torch.split(together, sizes), strict=True):
                found[place] = piece.view(tensors[place].shape)
        return found


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _types(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    """The types of some tensors, in order: the tensors of a type are sent as one message."""
    return list(dict.fromkeys(one.dtype for one in tensors if one.numel()))


def _as_bytes(tensor: Tensor) -> Tensor:
    """Every backend sends bytes; not every one sends booleans."""
    return tensor.view(torch.uint8)

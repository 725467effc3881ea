"""The most memory that a forward and backward pass holds at once, followed allocation by allocation."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.layer_profile import imagined
from omnivl.model.chain import Chain
from omnivl.model.state import State


@dataclass(frozen=True)
class LivePeak:
    """Bytes beyond parameters and the batch.

    Attributes:
        forward: What is there when the forward pass ends: kept for the backward pass.
        alone: The most of all but the parameters' gradients.
        with_gradients: The most of all, of a micro-batch that finds no gradients there.
    """

    forward: int
    alone: int
    with_gradients: int


def live_peak(chain: Chain, state: State) -> LivePeak:
    """Follows one micro-batch through a chain.

    Args:
        chain: On ``meta`` for an accelerator's kernels, which hold no memory then; or on the CPU for its own.
        state: From ``engine.layer_profile.blank_states``, on the same device.
    """
    tracker = _LiveBytes()
    gradients = 0

    def leave(parameter: Tensor) -> None:
        nonlocal gradients
        assert parameter.grad is not None
        gradients += parameter.grad.nbytes
        parameter.grad = None
        tracker.other = gradients

    trained = [one for one in chain.parameters() if one.requires_grad]
    handles = [one.register_post_accumulate_grad_hook(leave) for one in trained]  # type: ignore[no-untyped-call]
    try:
        with imagined(), tracker:
            last = chain(state)
            kept = tracker.live
            last["loss"].backward()
    finally:
        for handle in handles:
            handle.remove()
        chain.discard_step()
    return LivePeak(kept, tracker.most, tracker.most_with_other)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages from the operation that makes them to the end of their last tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = self.most_with_other = self.other = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_number(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _number(leaf) not in given:
                self._follow(leaf.untyped_storage())
        self.most = max(self.most, self.live)
        self.most_with_other = max(self.most_with_other, self.live + self.other)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        number = int(storage._cdata)
        if number not in self._known:
            self._known.add(number)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, number, storage.nbytes())

    def _forget(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live -= size


def _number(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

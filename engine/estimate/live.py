"""The most memory that a forward and backward pass holds at once, followed allocation by allocation."""

from dataclasses import dataclass

from torch import Tensor

from engine.estimate.allocations import Allocations
from engine.estimate.layers import accelerator_kernels
from omnivl.chain.chain import Chain
from omnivl.chain.state import State


@dataclass(frozen=True)
class LivePeak:
    """Bytes in addition to parameters and the batch.

    Attributes:
        forward: Allocated when the forward pass ends: kept for the backward pass.
        alone: Peak without the parameters' gradients.
        with_gradients: Peak of a micro-batch before which there are no gradients.
    """

    forward: int
    alone: int
    with_gradients: int


def live_peak(chain: Chain, state: State) -> LivePeak:
    """Follows one micro-batch through a chain.

    Args:
        chain: On ``meta`` for an accelerator's kernels, or on the CPU for the CPU's.
        state: From ``engine.estimate.layers.blank_states``, on the same device.
    """
    tracker = Allocations()
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
        with accelerator_kernels(), tracker:
            last = chain(state)
            kept = tracker.live
            last["loss"].backward()
    finally:
        for handle in handles:
            handle.remove()
        chain.discard_step()
    return LivePeak(kept, tracker.most, tracker.most_with_other)

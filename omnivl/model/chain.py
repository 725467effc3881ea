"""The chain: the model with its objectives as a list of layers that pass a ``State`` on.

    Embed -> VisualBlock * n -> VisualNorm -> TextBlock * n -> Contrast -> AlignmentBlock * n -> GenerationBlock * n
          -> Losses

``for layer in chain.layers: state = layer(state)`` is the whole forward pass. A plain host runs it, ZeRO hosts it as one
module, a pipeline host cuts the list.
"""

from abc import ABC, abstractmethod

from torch import nn

from omnivl.model.state import State


class ChainLayer(nn.Module, ABC):
    """One link of the chain. The unit that a pipeline cuts at and that ZeRO-3 gathers (a "leaf module").

    A layer whose stream is absent from the layout returns the state unchanged. Nothing is written in ``forward``
    (activation recomputation would do it twice); what has to change after a step changes in ``after_step``.
    """

    @abstractmethod
    def forward(self, state: State) -> State:
        """Returns a new state with this layer's stream advanced."""

    def after_step(self) -> None:
        """Called once per optimizer step, after the weights moved: momentum twins move, the queue takes its keys."""

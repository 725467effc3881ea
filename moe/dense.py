"""The dense filling of the feed-forward slot: two linear maps with an activation between.

Shapes: D hidden size, F inner size; leading dimensions are free.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import Activation
from moe.linear import Linear
from moe.slot import FeedForwardOutput
from moe.tokens import Tokens


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``. Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2; so in CLIP's code."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


class DenseFeedForward(nn.Module):
    """``fc2(activate(fc1(x)))``, the same for every token."""

    def __init__(self, hidden_size: int, inner_size: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activate = _ACTIVATIONS[activation]
        self.fc1 = Linear(hidden_size, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape; ``tokens`` is ignored."""
        return FeedForwardOutput(self.fc2(self.activate(self.fc1(x))))

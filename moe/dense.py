"""The dense filling of the feed-forward slot: two linear maps with an activation between.

Shapes: D hidden size, F inner size; leading dimensions are free.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import Activation
from moe.linear import LayerNorm, Linear, Role
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
    """``fc2(activate(fc1(x)))``, the same for every token; with ``norm_eps`` normalised before ``fc2``.

    Source: Wang et al., Magneto, arXiv 2210.06423, section 2.1 (sub-LayerNorm).
    """

    def __init__(
        self, hidden_size: int, inner_size: int, activation: Activation = "gelu", norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.activate = _ACTIVATIONS[activation]
        self.fc1 = Linear(hidden_size, inner_size)
        self.norm = None if norm_eps is None else LayerNorm(inner_size, norm_eps)
        self.fc2 = Linear(inner_size, hidden_size)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """What the two maps are for."""
        yield from (("feed_forward", self.fc1), ("feed_forward", self.fc2))

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape; ``tokens`` is ignored. ``beside`` is ``x``: see ``linear_beside``."""
        inner, x = self.fc1(x, beside=True)
        inner = self.activate(inner)
        return FeedForwardOutput(self.fc2(inner if self.norm is None else self.norm(inner)), beside=x)

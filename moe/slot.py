"""The feed-forward slot of a transformer block: its position, and the inputs and outputs of every filling.

Shapes: D hidden size; leading dimensions of a call are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe.config import Activation
from moe.tokens import Tokens


@dataclass(frozen=True)
class FeedForwardOutput:
    """The output of a feed-forward slot. Outputs of a router are returned as values, never stored in a module.

    Attributes:
        y: ``[..., D]``, same shape and dtype as the input.
        router_sums: The packed ``moe.routers.sums.RouterSums`` of the call, fp32, with gradient; None without a router.
        beside: The input for whatever else reads it, which may save adding gradients up (``moe.linear.linear_beside``).
    """

    y: Tensor
    router_sums: Tensor | None = None
    beside: Tensor | None = None


class FeedForward(Protocol):
    """Anything that can stand in the feed-forward slot of a block."""

    def __call__(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x`` ``[..., D]`` to the same shape.

        Args:
            x: Normalised hidden states.
            tokens: Modality and validity of the tokens, in the order of ``x`` flattened.
        """


@dataclass(frozen=True)
class Slot:
    """Position of a feed-forward layer in a model.

    Attributes:
        block: Index of the block in its stack.
        modalities: Modalities of the tokens that the layer gets.
        known: All modalities that the model knows, in the order in which statistics name them.
        fused: For each kind of sequence that the layer gets: False for sequences of one modality, True for those that
            join several.
        depth: Number of blocks in its stack; needed where the configuration names blocks.
        activation: Of dense perceptrons, those by modality included; experts have ``gelu``.
        inner_norm_eps: Of dense perceptrons, those by modality included: added to the variance in a norm before the
            second map; None: they have no such norm.
    """

    block: int
    modalities: Sequence[str]
    known: Sequence[str]
    fused: Sequence[bool] = (False,)
    depth: int | None = None
    activation: Activation = "gelu"
    inner_norm_eps: float | None = None

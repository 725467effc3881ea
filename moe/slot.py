"""The feed-forward slot of a transformer block: where it stands, what every filling gets and returns.

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
    """What a feed-forward slot returns. What a router says is returned as a value, never stored in a module.

    Attributes:
        y: ``[..., D]``, same shape and dtype as the input.
        router_sums: The packed ``moe.routers.sums.RouterSums`` of the call, fp32, with gradient; None where nothing
            was routed by a router.
    """

    y: Tensor
    router_sums: Tensor | None = None


class FeedForward(Protocol):
    """Anything that can stand in the feed-forward slot of a block."""

    def __call__(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x`` ``[..., D]`` to the same shape.

        Args:
            x: Normalised hidden states.
            tokens: Modality and validity of the tokens, in the order in which ``x`` unrolls.
        """


@dataclass(frozen=True)
class Slot:
    """Where in a model a feed-forward layer stands.

    Attributes:
        block: Index of the block in its stack.
        modalities: Modalities of the tokens that the layer gets, of those that the model knows.
        known: All modalities that the model knows, in the order in which statistics name them.
        fused: Which tokens the layer gets: those of sequences of one modality (False), those of sequences that join
            several (True).
        depth: Number of blocks in its stack; needed where the configuration names blocks.
        activation: Of dense perceptrons, those by modality included; experts have ``gelu``.
    """

    block: int
    modalities: Sequence[str]
    known: Sequence[str]
    fused: Sequence[bool] = (False,)
    depth: int | None = None
    activation: Activation = "gelu"

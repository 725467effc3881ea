"""The feed-forward slot of a transformer block: what fills it, and what every filling returns.

Shapes: T tokens (any leading dimensions), D hidden size, F inner size, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

Losses = Mapping[str, Tensor]
Statistics = Mapping[str, Tensor]


@dataclass(frozen=True)
class FeedForwardOutput:
    """What a feed-forward slot returns. Losses and statistics travel as values, never as module attributes.

    Attributes:
        y: ``[..., D]``, same shape and dtype as the input.
        losses: Auxiliary losses by name, scalars with gradient; empty for a dense layer.
        statistics: Detached routing statistics by name; empty for a dense layer.
    """

    y: Tensor
    losses: Losses = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)


class FeedForward(Protocol):
    """Anything that can stand in the feed-forward slot of a block."""

    def __call__(self, x: Tensor, modality_ids: Tensor | None = None) -> FeedForwardOutput:
        """Maps ``x`` ``[..., D]`` to the same shape.

        Args:
            x: Normalised hidden states ``[..., D]``.
            modality_ids: int64, broadcastable to ``x.shape[:-1]``; which modality each token is of. Dense layers
                ignore it.
        """


@dataclass(frozen=True)
class DenseConfig:
    """An ordinary two-layer perceptron, the same for every token."""

    kind: Literal["dense"] = "dense"


FeedForwardConfig = DenseConfig
"""Union of everything that can fill the slot, discriminated by ``kind``."""


def build_feed_forward(config: FeedForwardConfig, hidden_size: int, inner_size: int) -> nn.Module:
    """Builds the module that fills one block's feed-forward slot; it satisfies ``FeedForward``.

    Args:
        config: What to build, one member of the union.
        hidden_size: D.
        inner_size: F, of a dense layer or of one expert.
    """
    from moe.dense import DenseFeedForward  # here, because the fillings import this file's contract

    return DenseFeedForward(hidden_size, inner_size)

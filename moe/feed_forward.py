"""The feed-forward slot of a transformer block: what every filling gets and returns, and how it is built.

Shapes: D hidden size, F inner size; leading dimensions of a call are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from moe.config import (
    Activation,
    AttributeConfig,
    FeedForwardConfig,
    LIMoEConfig,
    MoMEConfig,
    MoMELIMoEConfig,
    SparseConfig,
)
from moe.tokens import Tokens


@dataclass(frozen=True)
class FeedForwardOutput:
    """What a feed-forward slot returns. What a router has to say travels as a value, never as a module's attribute.

    Attributes:
        y: ``[..., D]``, same shape and dtype as the input.
        router_sums: The packed ``moe.router_losses.RouterSums`` of the call, fp32, with gradient; None where nothing
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
        modalities: Modalities of the tokens that come by, of those that the model knows.
        known: All modalities that the model knows, in the order in which statistics name them.
        fused: Which tokens come by: those of sequences of one modality (False), of sequences that join several (True).
        depth: Number of blocks in its stack; needed where the configuration names blocks.
        activation: Of dense perceptrons, those by modality included; experts have ``gelu``.
    """

    block: int
    modalities: Sequence[str]
    known: Sequence[str]
    fused: Sequence[bool] = (False,)
    depth: int | None = None
    activation: Activation = "gelu"


def build_feed_forward(config: FeedForwardConfig, hidden_size: int, inner_size: int, slot: Slot) -> nn.Module:
    """Builds the module that fills one block's feed-forward slot; it satisfies ``FeedForward``.

    Args:
        config: What to build, one member of the union.
        hidden_size: D.
        inner_size: F, of a dense layer.
        slot: Where it stands.
    """
    from moe.attribute import AttributeFeedForward  # here, because the fillings import this file's contract
    from moe.dense import DenseFeedForward
    from moe.modality import ModalityFeedForward
    from moe.sparse import SparseFeedForward

    if isinstance(config, MoMEConfig):
        return ModalityFeedForward(config, hidden_size, inner_size, slot)
    if isinstance(config, AttributeConfig) and has_experts(config, slot.block, slot.depth):
        return AttributeFeedForward(config, hidden_size, inner_size)
    if is_routed(config, slot.block, slot.depth):
        return SparseFeedForward(cast("LIMoEConfig | MoMELIMoEConfig", config), hidden_size, inner_size, slot.known)
    return DenseFeedForward(hidden_size, inner_size, slot.activation)


def is_routed(config: FeedForwardConfig, block: int, depth: int | None = None) -> bool:
    """Whether block ``block`` of a stack of ``depth`` has a router that looks at tokens."""
    return isinstance(config, SparseConfig) and has_experts(config, block, depth)


def has_attention_experts(config: FeedForwardConfig, block: int, depth: int | None = None) -> bool:
    """Whether the attention projections of block ``block`` of a stack of ``depth`` have experts by attributes."""
    return isinstance(config, AttributeConfig) and config.attention and has_experts(config, block, depth)


def has_experts(config: SparseConfig | AttributeConfig, block: int, depth: int | None) -> bool:
    """Whether block ``block`` of a stack of ``depth`` has experts: it is named, or the last one of a group."""
    if config.blocks is None:
        return block % config.every == config.every - 1
    assert depth is not None, "where blocks are named the depth of the stack has to be known"
    return block in config.blocks or block - depth in config.blocks

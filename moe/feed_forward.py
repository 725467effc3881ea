"""Builds the filling of a feed-forward slot (``moe.slot``) from its configuration."""

from typing import cast

from torch import nn

from moe.attribute import AttributeFeedForward
from moe.config import AttributeConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig, SparseConfig
from moe.dense import DenseFeedForward
from moe.modality import ModalityFeedForward
from moe.slot import Slot
from moe.sparse import SparseFeedForward


def build_feed_forward(config: FeedForwardConfig, hidden_size: int, inner_size: int, slot: Slot) -> nn.Module:
    """Builds the module that fills one block's feed-forward slot; it satisfies ``FeedForward``.

    Args:
        config: What to build, one member of the union.
        hidden_size: D.
        inner_size: F, of a dense layer.
        slot: Position of the layer in the model.
    """
    if isinstance(config, MoMEConfig):
        return ModalityFeedForward(config, hidden_size, inner_size, slot)
    if isinstance(config, AttributeConfig) and has_experts(config, slot.block, slot.depth):
        return AttributeFeedForward(config, hidden_size, inner_size)
    if is_routed(config, slot.block, slot.depth):
        return SparseFeedForward(cast("LIMoEConfig | MoMELIMoEConfig", config), hidden_size, inner_size, slot.known)
    return DenseFeedForward(hidden_size, inner_size, slot.activation, slot.inner_norm_eps)


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

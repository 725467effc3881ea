"""Parameters and operations of a feed-forward slot by arithmetic, without building it.

Letters: D hidden size, F inner size, E experts, K choices per token.
"""

from typing import cast

from moe.config import AttributeConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.feed_forward import has_experts, is_routed
from moe.modality import experts_of
from moe.slot import Slot


def slot_parameters(config: FeedForwardConfig, hidden_size: int, inner_size: int, slot: Slot) -> int:
    """Parameters of what ``build_feed_forward`` makes of the same arguments."""
    if isinstance(config, MoMEConfig):
        return len(experts_of(config, slot)) * _perceptron(hidden_size, inner_size)
    if isinstance(config, AttributeConfig) and has_experts(config, slot.block, slot.depth):
        return config.num_experts * _perceptron(hidden_size, inner_size) + _attribute_gate(config)
    if not is_routed(config, slot.block, slot.depth):
        return _perceptron(hidden_size, inner_size)
    sparse = cast("LIMoEConfig | MoMELIMoEConfig", config)
    inner = round(inner_size * sparse.expert_ratio)
    shared = _perceptron(hidden_size, inner * sparse.shared_experts) if sparse.shared_experts else 0
    router = sparse.router.num_parameters(hidden_size, sparse.num_experts)
    return sparse.num_experts * _perceptron(hidden_size, inner) + router + shared


def projection_parameters(config: AttributeConfig, inputs: int, outputs: int) -> int:
    """Parameters of an attention projection with experts by attributes. One token's products are a plain one's."""
    return config.num_experts * (inputs * outputs + outputs) + _attribute_gate(config)


def slot_flops(config: FeedForwardConfig, hidden_size: int, inner_size: int, block: int, depth: int) -> float:
    """Operations of one token's products, forward: of the experts that it goes to, and of the router."""
    if isinstance(config, AttributeConfig) and has_experts(config, block, depth):
        return config.top_k * 4.0 * hidden_size * inner_size
    if not is_routed(config, block, depth):
        return 4.0 * hidden_size * inner_size
    sparse = cast("LIMoEConfig | MoMELIMoEConfig", config)
    one = 4.0 * hidden_size * round(inner_size * sparse.expert_ratio)
    router = sparse.router.flops(hidden_size, sparse.num_experts)
    return (sparse.router.experts_per_token + sparse.shared_experts) * one + router


def _attribute_gate(config: AttributeConfig) -> int:
    size = config.attribute_size
    return config.num_attributes * size + size + 2 * size + size * config.num_experts


def _perceptron(hidden_size: int, inner_size: int) -> int:
    return 2 * hidden_size * inner_size + inner_size + hidden_size

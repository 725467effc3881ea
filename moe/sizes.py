"""Operations of a feed-forward slot by arithmetic, without building it."""

from typing import cast

from moe.config import AttributeConfig, FeedForwardConfig, LIMoEConfig, MoMELIMoEConfig
from moe.feed_forward import has_experts, is_routed


def slot_flops(config: FeedForwardConfig, hidden_size: int, inner_size: int, block: int, depth: int | None) -> float:
    """Operations of one token's products, forward: of the experts that it goes to, and of the router."""
    if isinstance(config, AttributeConfig) and has_experts(config, block, depth):
        return config.top_k * 4.0 * hidden_size * inner_size
    if not is_routed(config, block, depth):
        return 4.0 * hidden_size * inner_size
    sparse = cast("LIMoEConfig | MoMELIMoEConfig", config)
    one = 4.0 * hidden_size * round(inner_size * sparse.expert_ratio)
    router = sparse.router.flops(hidden_size, sparse.num_experts)
    return (sparse.router.experts_per_token + sparse.shared_experts) * one + router

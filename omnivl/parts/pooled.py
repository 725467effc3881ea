"""Blocks of a decoder that looks at what queries have gathered, with one or with two feed-forward layers.

Shapes: R rows, L text positions, S visual positions, D hidden size.

Source: Yu et al., CoCa, arXiv 2205.01917, section 3.2; with two, the decoder of open_clip's ``CoCa``, whose blocks are
    CLIP's: one with self-attention, one with cross-attention, and what the latter looks at is normalised.
"""

from typing import ClassVar

from torch import Tensor

from moe.feed_forward import build_feed_forward
from moe.slot import FeedForwardOutput, Slot
from omnivl.parts.bert import TEXT_MODALITY
from omnivl.parts.decoder import GroundedBlock
from omnivl.parts.linear import LayerNorm
from omnivl.parts.padding import Padding
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MODALITIES, Transformer


class PooledBlock(GroundedBlock):
    """A grounded block that looks at what queries have gathered."""

    sees_patches: ClassVar[bool] = False


class AlternatingBlock(PooledBlock):
    """Self-attention, feed-forward, cross-attention, feed-forward; dense ones only, since nobody sums two routers."""

    def __init__(self, sizes: Transformer, causal: bool, index: int = 0, memory_size: int | None = None) -> None:
        """Builds the block; see ``GroundedBlock``."""
        super().__init__(sizes, causal, index, memory_size)
        size, eps = sizes.hidden_size, sizes.norm_eps
        slot = Slot(
            index, (TEXT_MODALITY,), MODALITIES, fused=(False,), depth=sizes.layers, activation=sizes.activation
        )
        self.ffn_own = build_feed_forward(sizes.ffn, size, sizes.inner_size, slot)
        self.norm_own = LayerNorm(size, eps)
        self.norm_memory = LayerNorm(size if memory_size is None else memory_size, eps)

    def flops(self, tokens: float, positions: float, seen: float) -> float:
        """See ``GroundedBlock``."""
        return super().flops(tokens, positions, seen) + tokens * self.slot_flops

    def project(self, memory: Tensor) -> Tensor:
        """See ``GroundedBlock``."""
        return super().project(self.norm_memory(memory))

    def project_beside(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GroundedBlock``."""
        return self.project(memory), memory

    def _after_self_attention(
        self,
        x: Tensor,
        kv: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None,
        mask: Tensor | None = None,
        padding: Padding | None = None,
    ) -> FeedForwardOutput:
        tokens = self.tokens(x, mask, padding, causal=self.causal)
        fed: FeedForwardOutput = recomputed(self.recomputes_ffn, self.ffn_own, self.enter(self.norm_own, x), tokens)
        x = self.leave(self.norm_own, x, fed.y)
        return super()._after_self_attention(x, kv, rows, memory_mask, mask, padding)

"""Attentional pooling: learnt queries gather what an image encoder gives, for contrast and for captions.

Shapes: R rows, S positions of the encoder, Q queries, D width of the encoder, P width of what is gathered.

Source: Yu et al., CoCa, arXiv 2205.01917, section 3.2 (attentional poolers); numbers as in open_clip: a pooler is one
    cross-attention between normalised queries and normalised positions, without a residual connection.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from omnivl.chain.backward import VISUAL
from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import CrossAttention, cross_attention
from omnivl.parts.block import BlockLayer
from omnivl.parts.join import JoinRows
from omnivl.parts.linear import LayerNorm, Linear, Role, draw_normal
from omnivl.parts.patches import num_patches
from omnivl.parts.sizes import Patches, Transformer

Pooling = Literal["cascade", "parallel", "joint"]
"""How a row is pooled for contrast: by one query that attends to what the queries for captions have gathered, by one
that attends to the encoder's positions as these do, or by the first of a single pooler's queries."""


def contrast_name(stream: str) -> str:
    """The field with what stands for each row of a stream in contrast, float ``[R, P]``."""
    return f"contrast/{stream}"


class PoolerAttention(CrossAttention):
    """Cross-attention of a pooler, which is no block: adapters leave it out."""

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``: none."""
        yield from ()


class AttentionalPooler(nn.Module):
    """Queries that attend to the positions of an encoder."""

    def __init__(self, queries: int, size: int, heads: int, memory_size: int, eps: float) -> None:
        """Builds the pooler.

        Args:
            queries: Q.
            size: P.
            heads: Of the attention.
            memory_size: D.
            eps: Of the normalisations.
        """
        super().__init__()
        self.num_queries = queries
        self.queries = nn.Parameter(torch.empty(queries, size))
        draw_normal(self.queries, std=0.02)
        self.norm_queries, self.norm_memory = LayerNorm(size, eps), LayerNorm(memory_size, eps)
        self.attention = PoolerAttention(size, heads, memory_size=memory_size)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The queries."""
        yield self.queries

    def flops(self, rows: int, seen: float, queries: int | None = None) -> float:
        """Operations on rows of ``seen`` positions, forward; of the first ``queries`` queries, None: of all.

        Queries are projected once for all rows.
        """
        count = self.num_queries if queries is None else queries
        attention, once = self.attention, count * 2.0 * self.attention.q.in_features**2
        return rows * (attention.flops(count / 2, count, seen) + attention.project_flops(seen)) + once * (rows > 0)

    def forward(self, x: Tensor, mask: Tensor | None = None, queries: int | None = None) -> Tensor:
        """Gathers ``x [R, S, D]`` to ``[R, Q, P]``.

        Args:
            x: Positions of the encoder.
            mask: bool ``[R, S]``, which are no padding; None: all.
            queries: How many queries are wanted, from the first on; None: all.
        """
        attention, kv = self.attention, self.attention.project(self.norm_memory(x))
        q: Tensor = attention.q(self.norm_queries(self.queries[:queries].to(x.dtype)))
        attended = cross_attention(q.expand(len(x), -1, -1), kv, attention.num_heads, mask)
        gathered: Tensor = attention.out(attended)
        return gathered


class Poolers(nn.Module):
    """The poolers of an encoder and its last normalisation."""

    def __init__(self, pooling: Pooling, queries: int, size: int, heads: int, sizes: Transformer) -> None:
        """Builds them.

        Args:
            pooling: See ``Pooling``.
            queries: For captions; with ``joint``, and one for contrast before them.
            size: P.
            heads: Of the poolers' attention.
            sizes: Of the encoder.
        """
        super().__init__()
        self.pooling, width, eps = pooling, sizes.hidden_size, sizes.norm_eps
        joint = pooling == "joint"
        self.captions = AttentionalPooler(queries + joint, size, heads, width, eps)
        memory = size if pooling == "cascade" else width
        self.contrast = None if joint else AttentionalPooler(1, size, heads, memory, eps)
        self.norm = LayerNorm(size if joint else width, eps)

    def flops(self, rows: int, seen: float, contrast: bool, captions: bool) -> float:
        """Operations on rows of ``seen`` positions, forward; see ``forward``."""
        if self.contrast is None:
            return self.captions.flops(rows, seen, None if captions else 1)
        cascades = self.pooling == "cascade"
        one = self.contrast.flops(rows, self.captions.num_queries if cascades else seen) * contrast
        return one + self.captions.flops(rows, seen) * (captions or cascades)

    def forward(
        self, x: Tensor, mask: Tensor | None, contrast: bool, captions: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Pools ``x [R, S, D]``.

        Args:
            x: Output of the encoder's blocks.
            mask: bool ``[R, S]``, which positions are no padding; None: all.
            contrast: Whether what stands for a row in contrast is wanted.
            captions: Whether what the queries for captions gather is wanted.

        Returns:
            The former, ``[R, P]``, and the latter, ``[R, Q, P]``; None for what is not wanted.
        """
        if self.contrast is None:
            gathered = self.norm(self.captions(x, mask, None if captions else 1))
            return gathered[:, 0] if contrast else None, gathered[:, 1:] if captions else None
        x = self.norm(x)
        gathered = self.captions(x, mask) if captions or self.pooling == "cascade" else None
        pooled = None
        if contrast:
            pooled = self.contrast(x, mask) if self.pooling == "parallel" else self.contrast(gathered)
            pooled = pooled[:, 0]
        return pooled, gathered if captions else None


class PoolVisual(BlockLayer):
    """The end of an image encoder: ``visual`` becomes what the queries for captions gather, without padding.

    Adds ``contrast/visual``, which the projection reads, where there is one; if only that is read, ``visual`` is the
    same.
    """

    stack = branch = VISUAL

    def __init__(
        self, pooling: Pooling, queries: int, size: int, heads: int, sizes: Transformer, patches: Patches
    ) -> None:
        """Builds the poolers; see ``Poolers``.

        Args:
            pooling: How a row is pooled for contrast.
            queries: Q.
            size: P.
            heads: Of the poolers' attention.
            sizes: Of the encoder.
            patches: Sizes of pictures and patches.
        """
        super().__init__("visual_pool", lambda still: Poolers(pooling, queries, size, heads, sizes))
        self.patches = patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all visual rows."""
        assert isinstance(self.block, Poolers)
        seen = layout.num_frames * (1 + num_patches(self.patches, layout))
        return self.backward.passes * self.block.flops(num_rows(layout.visual), seen, *_wanted(layout))

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """All without pictures; the pooler whose result no loss reads."""
        block, active = self.block, [layout for layout in layouts if self.acts(layout)]
        assert isinstance(block, Poolers)
        contrasts = any("visual_embedding" in layout.reads for layout in active)
        captions = any(layout.generation or "visual" in layout.reads for layout in active)
        if not active:
            yield from block.norm.parameters()
        if block.contrast is not None and not contrasts:
            yield from block.contrast.parameters()
        if not captions and not (contrasts and block.pooling != "parallel"):
            yield from block.captions.parameters()

    def forward(self, state: State) -> State:
        """See the class."""
        if not self.acts(state.layout):
            return state
        pooled, gathered = self.run(state["visual"], state.get("visual_mask"), *_wanted(state.layout))
        made = {contrast_name("visual"): pooled, "visual": pooled[:, None] if gathered is None else gathered}
        found = {name: tensor for name, tensor in made.items() if tensor is not None}
        return state.merged(found, drop=("visual_mask",))


def _wanted(layout: StepLayout) -> tuple[bool, bool]:
    """Whether rows are contrasted, and whether what the queries for captions gather is read."""
    return layout.embeds, not layout.class_only


class JoinPooled(JoinRows):
    """``JoinRows`` behind poolers: what was projected for contrast is dropped."""

    def forward(self, state: State) -> State:
        """See ``JoinRows``."""
        if not self.acts(state.layout):
            return state
        return super().forward(state).updated(drop=(contrast_name("visual"), contrast_name("text")))

"""The two visual-grounded decoders: alignment (bidirectional) and generation (causal).

Shapes: R rows, L text positions, S visual positions, D hidden size.

Blocks are BERT's (post-norm or pre-norm), with cross-attention to the visual features before the feed-forward layer.
Source: OmniVL, arXiv 2209.07526, section 3.1; the block is BLIP's (Li et al., arXiv 2201.12086, figure 2).
Differs: BLIP shares all weights but self-attention between its text encoder and decoders; here each stack has its own.
    BLIP's alignment decoder is its text encoder with cross-attention: it begins at the word embeddings, with a token of
    its own in the first place. Here it begins at the text encoder's output, so that words pass the blocks of both, and
    BLIP's weights, loaded into it, do not match as BLIP does before they are trained.
"""

from typing import ClassVar

import torch
from torch import Tensor

from moe.config import SparseConfig
from moe.feed_forward import build_feed_forward, is_routed
from moe.slot import FeedForwardOutput, Slot
from omnivl.chain.flops import num_rows, twin_rows, written
from omnivl.chain.positions import kept_name
from omnivl.chain.regions import region_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import CrossAttention, SelfAttention
from omnivl.parts.bert import TEXT_MODALITY, ResidualBlock
from omnivl.parts.block import StackBlock
from omnivl.parts.linear import LayerNorm
from omnivl.parts.padding import Padding
from omnivl.parts.patches import num_patches, num_times, visual_positions
from omnivl.parts.sizes import MODALITIES, MomentumConfig, Patches, Transformer


def looking_ahead(sizes: Transformer) -> str | None:
    """The kind of a stack's router if it looks at all tokens, later ones included; else None."""
    ffn, depth = sizes.ffn, sizes.layers
    if not isinstance(ffn, SparseConfig) or not ffn.router.looks_ahead:
        return None
    return ffn.router.kind if any(is_routed(ffn, index, depth) for index in range(depth)) else None


class GroundedBlock(ResidualBlock):
    """Self-attention, cross-attention to visual features, feed-forward; without the chain around it."""

    sees_patches: ClassVar[bool] = True
    """Whether the visual features have a position for each patch."""

    def __init__(self, sizes: Transformer, causal: bool, index: int = 0, memory_size: int | None = None) -> None:
        """Builds the block.

        Args:
            sizes: Of its stack.
            causal: Whether a position sees itself and earlier ones only.
            index: Which block of the stack.
            memory_size: Width of the visual features; None: that of the stack.
        """
        super().__init__(sizes, index)
        slot = Slot(index, (TEXT_MODALITY,), MODALITIES, fused=(True,), depth=sizes.layers, activation=sizes.activation)
        self.causal = causal
        self.attention = SelfAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention")
        self.norm1 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        self.cross = CrossAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention", memory_size)
        self.norm2 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        self.ffn = build_feed_forward(sizes.ffn, sizes.hidden_size, sizes.inner_size, slot)
        self.norm3 = LayerNorm(sizes.hidden_size, sizes.norm_eps)

    def flops(self, tokens: float, positions: float, seen: float) -> float:
        """Operations on one text, forward, without the projection of the visual features.

        Args:
            tokens: Its tokens.
            positions: Positions of its row, padding included.
            seen: Number of visual positions.
        """
        cross = self.cross.flops(tokens, positions, seen)
        return self.attention.flops(tokens, positions) + cross + tokens * self.slot_flops

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Advances ``x [R, L, D]``.

        Args:
            x: The text stream.
            mask: bool ``[R, L]``, true where there is a token.
            memory: What the texts look at, ``[R_memory, S, D]``.
            rows: int64 ``[R]``, the memory row of each row; None when they correspond one to one.
            memory_mask: bool ``[R_memory, S]``, which of its positions may be looked at; None for all.
            kept: int64 ``[n]``, the positions to compute where they are known.

        Returns:
            The stream; ``beside`` is the memory, for whatever else reads it.
        """
        padding = Padding.worth_dropping(mask, kept)
        x = x if padding is None else padding.drop(x)
        attended, read = self.attend(self.norm1, x, mask, padding)
        x = self.leave(self.norm1, x if self.is_pre_norm else read, attended)
        kv, memory = self.project_beside(memory)
        out = self._after_self_attention(x, kv, rows, memory_mask, mask, padding)
        y = out.y if padding is None else padding.restore(out.y)
        return FeedForwardOutput(y, out.router_sums, memory)

    def project(self, memory: Tensor) -> Tensor:
        """Keys and values of the memory, ``[R_memory, S, 2 D]``."""
        return self.cross.project(memory)

    def project_beside(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """``project``, and the memory for whatever else reads it (``moe.linear.linear_beside``)."""
        return self.cross.project_beside(memory)

    def decode(
        self, x: Tensor, past: Tensor | None, kv: Tensor, rows: Tensor | None, memory_mask: Tensor | None = None
    ) -> tuple[FeedForwardOutput, Tensor]:
        """Advances the last positions ``x [R, l, D]`` of a causal stream whose earlier keys and values are known.

        Args:
            x: The new positions.
            past: Keys and values of the earlier positions, ``[R, L - l, 2 D]``; None at the start.
            kv: Projected memory, from ``project``.
            rows: As in ``forward``.
            memory_mask: As in ``forward``.

        Returns:
            The block's output and the keys and values of all positions, ``[R, L, 2 D]``.
        """
        attended, past = self.attention.extend(self.enter(self.norm1, x), past)
        return self._after_self_attention(self.leave(self.norm1, x, attended), kv, rows, memory_mask), past

    def _after_self_attention(
        self,
        x: Tensor,
        kv: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None,
        mask: Tensor | None = None,
        padding: Padding | None = None,
    ) -> FeedForwardOutput:
        seen, read = self.cross(self.enter(self.norm2, x), kv, rows, padding, memory_mask, beside=True)
        x = self.leave(self.norm2, x if self.is_pre_norm else read, seen)
        x, out = self.feed(self.norm3, x, self.tokens(x, mask, padding, fused=True, causal=self.causal))
        return FeedForwardOutput(self.norm_out(x), out.router_sums)


class GroundedLayer(StackBlock):
    """Base of the layers of the two decoders."""

    causal: ClassVar[bool]
    """Whether a position sees itself and earlier ones only."""

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        length: int,
        patches: Patches,
        *,
        memory_size: int | None = None,
        momentum: MomentumConfig | None = None,
        block: type[GroundedBlock] = GroundedBlock,
        seen: int | None = None,
    ) -> None:
        """Builds block ``index`` of a decoder.

        Args:
            index: Which block.
            sizes: Of the decoder.
            length: L.
            patches: Sizes of the images and clips that texts look at.
            memory_size: Width of the visual features; None: that of the decoder.
            momentum: Of its twin; None builds none.
            block: Class of the block.
            seen: Positions that texts look at, if they are neither those of the visual encoder nor those of fused
                texts.
        """
        super().__init__(index, sizes, lambda own: block(own, self.causal, index, memory_size), momentum)
        self.length, self.patches, self.seen = length, patches, seen

    def grounded_flops(self, layout: StepLayout, rows: int, tokens: float, seen: float) -> float:
        """Operations on ``rows`` texts of ``tokens`` tokens each that look at ``seen`` positions, forward.

        Keys and values are projected once per sample, however many texts look at it, and once per region.
        """
        assert isinstance(self.block, GroundedBlock)
        pictures = layout.batch_size + region_rows(layout.batch_size, layout.regions)
        memory = pictures * self.block.cross.project_flops(seen) * (rows > 0)
        return rows * self.block.flops(tokens, self.length, seen) + memory


class AlignmentBlock(GroundedLayer):
    """A bidirectional grounded block on the fused rows, and its momentum twin on those that objectives read of it.

    It returns ``memory`` as it was, so that later readers' gradients pass through its product.
    """

    stack = "alignment"
    causal: ClassVar[bool] = False

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all fused rows, and of the twin, which sees every patch."""
        tokens = self.length if tokens is None else tokens
        seen = visual_positions(self.patches, layout) if self.seen is None else self.seen
        every = 1 + num_times(self.patches, layout) * num_patches(self.patches, layout)
        online = self.grounded_flops(layout, num_rows(layout.fused), tokens, seen)
        return self.backward.passes * online + self.grounded_flops(layout, twin_rows(layout, "fused"), tokens, every)

    def forward(self, state: State) -> State:
        """Advances ``fused`` and, if an objective reads it, ``momentum_fused``.

        Each row attends to row ``fused_memory`` of ``memory``, or ``momentum_fused_memory`` of ``momentum_memory``.
        """
        if not self.acts(state.layout):
            return state
        seen = state["memory"], state["fused_memory"], state.get("memory_mask")
        out: FeedForwardOutput = self.run(state["fused"], state["fused_mask"], *seen)
        assert out.beside is not None
        state = self.with_routing(state.updated(fused=out.y, memory=out.beside), out.router_sums)
        if "fused" in state.layout.twins:
            seen = state["momentum_memory"], state["momentum_fused_memory"], state.get("momentum_memory_mask")
            twin = self.run_twin(state["momentum_fused"], state.of_twins("fused_mask", "fused"), *seen)
            state = state.updated(momentum_fused=twin.y)
        return state


def seen_by_written(state: State) -> tuple[Tensor, Tensor | None]:
    """The memory of generated rows, ``[R_memory, S, D]``, and which of its positions are not padding; None: all."""
    rows = [state.layout.fused[name] for name in state.layout.written_from]
    if not rows:
        return state["memory"], state.get("memory_mask")
    if len(rows) == 1:
        return state["fused"][rows[0]], state["fused_mask"][rows[0]]
    return torch.cat([state["fused"][own] for own in rows]), torch.cat([state["fused_mask"][own] for own in rows])


class GenerationBlock(GroundedLayer):
    """A causal grounded block on the generation stream.

    Row b attends to row b of ``memory``, or to row ``generation_memory[b]``. If texts look at fused rows, these take
    the place of ``memory``, without their padding. If decoding keeps a cache, row b attends to row ``cache/rows[b]``,
    and the block stores its keys and values in ``cache/{layer}/self`` and ``cache/{layer}/cross``. Otherwise it returns
    the rows of ``memory`` that the stack looks at, so that later readers' gradients pass through its product.
    """

    stack = "generation"
    causal: ClassVar[bool] = True

    def acts(self, layout: StepLayout) -> bool:
        """Whether the generation stream runs."""
        return bool(layout.generation)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of the generation stream."""
        assert isinstance(self.block, GroundedBlock)
        fused = {name: layout.fused[name] for name in layout.written_from}
        usual = self.length if fused else visual_positions(self.patches, layout)
        seen = usual if self.seen is None else self.seen
        memory_rows = num_rows(fused) if fused else layout.batch_size * bool(layout.generation)
        total = memory_rows * self.block.cross.project_flops(seen)
        for name, rows in layout.generation.items():
            length = layout.joins[name].length
            own = written(self.length, tokens, length), self.length if length is None else length
            total += num_rows({name: rows}) * self.block.flops(*own, seen)
        return self.backward.passes * total

    def forward(self, state: State) -> State:
        """Advances ``generation``."""
        if not self.acts(state.layout):
            return state
        if "cache/rows" in state:
            return self._decode(state)
        (memory, mask), rows = seen_by_written(state), state.get("generation_memory")
        own = state.layout.batch_size
        if rows is None and not state.layout.written_from:  # rows of other replicas or segments may follow
            memory = memory if len(memory) == own else memory[:own]
            mask = None if mask is None else mask[:own]
        kept = state.get(kept_name("generation"))
        out: FeedForwardOutput = self.run(state["generation"], state["generation_mask"], memory, rows, mask, kept)
        if not state.layout.written_from:  # only layers of this stack follow
            assert out.beside is not None
            state = state.updated(memory=out.beside)
        return self.with_routing(state.updated(generation=out.y), out.router_sums)

    def _decode(self, state: State) -> State:
        assert isinstance(self.block, GroundedBlock)
        past_name, cross_name = f"cache/{self.name}/self", f"cache/{self.name}/cross"
        kv = state[cross_name] if cross_name in state else self.block.project(state["memory"])
        mask = state.get("memory_mask")
        out, past = self.block.decode(state["generation"], state.get(past_name), kv, state["cache/rows"], mask)
        return state.merged({"generation": out.y, past_name: past, cross_name: kv})

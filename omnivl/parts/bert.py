"""The text encoder: BERT's blocks, post-norm or pre-norm, in both directions or causal.

Shapes: R rows, L text positions, D hidden size.

Source: Devlin et al., BERT, arXiv 1810.04805; numbers as in its released code (post-norm, erf GELU, eps 1e-12).
    Pre-norm: Xiong et al., arXiv 2002.04745, figure 1b.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.feed_forward import build_feed_forward, is_routed
from moe.sizes import slot_flops
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Tokens
from omnivl.chain.backward import TEXT
from omnivl.chain.demands import TWIN
from omnivl.chain.flops import num_rows, twin_rows
from omnivl.chain.positions import kept_name
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import SelfAttention
from omnivl.parts.attributes import attributes_of
from omnivl.parts.block import StackBlock
from omnivl.parts.linear import LayerNorm
from omnivl.parts.padding import Padding
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MODALITIES, MomentumConfig, Transformer

TEXT_EPS = 1e-12
TEXT_MODALITY = "text"


class ResidualBlock(nn.Module):
    """Base of text and decoder blocks: normalisation and dropout around a branch, in pre-norm or post-norm order.

    Attributes:
        reads_padding: Whether the feed-forward slot has to be told which positions are padding.
        slot_flops: Operations of the feed-forward slot on one token, forward.
        attention: Self-attention, which subclasses build.
        causal: Whether a position sees itself and earlier ones only.
        ffn: The filling of the slot, which subclasses build.
        norm_out: Normalises what leaves the last block of a pre-norm stack; nothing elsewhere.
    """

    attention: SelfAttention
    causal: bool
    ffn: nn.Module

    def __init__(self, sizes: Transformer, index: int, *, norm_out: bool = True) -> None:
        """Builds what all have.

        Args:
            sizes: Of the stack.
            index: Which block of it.
            norm_out: Whether the last block of a pre-norm stack normalises what leaves it.
        """
        super().__init__()
        self.reads_padding = is_routed(sizes.ffn, index, sizes.layers)
        self.recomputes_ffn = sizes.recompute == "ffn"
        self.slot_flops = slot_flops(sizes.ffn, sizes.hidden_size, sizes.inner_size, index, sizes.layers)
        self.dropout, self.is_pre_norm = sizes.dropout, sizes.norm == "pre"
        normalises = norm_out and self.is_pre_norm and index == sizes.layers - 1
        self.norm_out = LayerNorm(sizes.hidden_size, sizes.norm_eps) if normalises else nn.Identity()

    def enter(self, norm: nn.Module, x: Tensor) -> Tensor:
        """The input of a branch: the stream ``x``, normalised in pre-norm blocks."""
        return norm(x) if self.is_pre_norm else x

    def attend(self, norm: nn.Module, x: Tensor, mask: Tensor | None, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """Self-attention to the stream ``x``, and what it read (``moe.linear.linear_beside``).

        Texts have their padding at the end, where no token of a causal block looks.
        """
        read = self.enter(norm, x)
        made: tuple[Tensor, Tensor] = self.attention(
            read, None if self.causal else mask, self.causal, padding, beside=True
        )
        return made

    def tokens(
        self, x: Tensor, mask: Tensor | None, padding: Padding | None, *, fused: bool = False, causal: bool = False
    ) -> Tokens:
        """``x`` as the feed-forward slot takes it."""
        bits = attributes_of(TEXT_MODALITY, fused=fused, causal=causal)
        if not self.reads_padding or mask is None:
            return Tokens.of(TEXT_MODALITY, x, fused=fused, attributes=bits)
        return Tokens.of(TEXT_MODALITY, x, mask if padding is None else padding.valid, fused=fused, attributes=bits)

    def feed(self, norm: nn.Module, x: Tensor, tokens: Tokens) -> tuple[Tensor, FeedForwardOutput]:
        """The stream after the feed-forward slot, and what the slot returned."""
        out: FeedForwardOutput = recomputed(self.recomputes_ffn, self.ffn, self.enter(norm, x), tokens)
        if not self.is_pre_norm and out.beside is not None:
            x = out.beside
        return self.leave(norm, x, out.y), out

    def leave(self, norm: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
        """The stream with a branch's output added."""
        x = x + F.dropout(branch, self.dropout, self.training)
        return x if self.is_pre_norm else norm(x)


class BertBlock(ResidualBlock):
    """One transformer block of the text encoder, without the chain around it."""

    def __init__(self, sizes: Transformer, index: int = 0, causal: bool = False, *, norm_out: bool = True) -> None:
        """Builds the block.

        Args:
            sizes: Of its stack.
            index: Which block of the stack.
            causal: Whether a position sees itself and earlier ones only.
            norm_out: See ``ResidualBlock``.
        """
        super().__init__(sizes, index, norm_out=norm_out)
        self.causal = causal
        slot = Slot(index, (TEXT_MODALITY,), MODALITIES, depth=sizes.layers, activation=sizes.activation)
        self.attention = SelfAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention")
        self.norm1 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        self.ffn = build_feed_forward(sizes.ffn, sizes.hidden_size, sizes.inner_size, slot)
        self.norm2 = LayerNorm(sizes.hidden_size, sizes.norm_eps)

    def flops(self, tokens: float, positions: float, first_only: bool) -> float:
        """Operations on one text of ``tokens`` tokens in a row of ``positions``, forward.

        If only the first position is wanted, it attends to all others, padding included.
        """
        if first_only:
            return self.attention.first_flops(positions) + self.slot_flops
        return self.attention.flops(tokens, positions) + tokens * self.slot_flops

    def forward(
        self, x: Tensor, mask: Tensor, first_only: bool = False, kept: Tensor | None = None
    ) -> FeedForwardOutput:
        """Advances ``x [R, L, D]``.

        Args:
            x: The text stream.
            mask: bool ``[R, L]``, true where there is a token.
            first_only: Whether only the first position is wanted: the result is ``[R, 1, D]``.
            kept: int64 ``[n]``, the positions to compute where they are known.
        """
        padding = None if first_only else Padding.worth_dropping(mask, kept)
        x = x if padding is None else padding.drop(x)
        if first_only:
            x, attended = x[:, :1], self.attention.first(self.enter(self.norm1, x), mask)
        else:
            attended, read = self.attend(self.norm1, x, mask, padding)
            x = x if self.is_pre_norm else read
        x = self.leave(self.norm1, x, attended)
        x, out = self.feed(self.norm2, x, self.tokens(x, mask, padding, causal=self.causal))
        y = self.norm_out(x)
        return FeedForwardOutput(y if padding is None else padding.restore(y), out.router_sums)


class TextBlock(StackBlock):
    """A BERT block on all text rows, and its momentum twin on the rows that objectives read of it."""

    stack = branch = TEXT

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        length: int,
        momentum: MomentumConfig | None = None,
        *,
        causal: bool = False,
        may_shorten: bool = True,
        norm_out: bool = True,
    ) -> None:
        """Builds block ``index`` of the encoder.

        Args:
            index: Which block.
            sizes: Of the encoder.
            length: L.
            momentum: Of its twin; None builds none.
            causal: Whether a position sees itself and earlier ones only. Then the first position is never read alone.
            may_shorten: Whether the last block may compute the first position only, if no other is read.
            norm_out: See ``ResidualBlock``.
        """
        super().__init__(index, sizes, lambda own: BertBlock(own, index, causal, norm_out=norm_out), momentum)
        self.length = length
        is_last = index == sizes.layers - 1
        self.may_shorten = may_shorten and is_last and not causal and not is_routed(sizes.ffn, index, sizes.layers)

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are text rows."""
        return bool(layout.text)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all text rows, and of the twin."""
        assert isinstance(self.block, BertBlock)
        length = self.length
        first_only = self.may_shorten and layout.class_only
        rows = self.backward.passes * num_rows(layout.text) + twin_rows(layout, "text")
        return rows * self.block.flops(length if tokens is None else tokens, length, first_only)

    def forward(self, state: State) -> State:
        """Advances ``text`` and, in a step with momentum, ``momentum_text``."""
        if not self.acts(state.layout):
            return state
        mask = state["text_mask"]
        first_only = self.may_shorten and state.layout.class_only
        out: FeedForwardOutput = self.run(state["text"], mask, first_only, state.get(kept_name("text")))
        state = self.with_routing(state.updated(text=out.y), out.router_sums)
        if "text" in state.layout.twins:
            own_mask, kept = state.of_twins("text_mask", "text"), state.get(kept_name(f"{TWIN}text"))
            twin = self.run_twin(state["momentum_text"], own_mask, first_only, kept)
            state = state.updated(momentum_text=twin.y)
        return state

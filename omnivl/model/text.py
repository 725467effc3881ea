"""The text encoder: BERT's post-norm blocks.

Shapes: R rows, L text positions, D hidden size.

Source: Devlin et al., BERT, arXiv 1810.04805; numbers as in its released code (post-norm, erf GELU, eps 1e-12).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.feed_forward import FeedForwardOutput, build_feed_forward
from omnivl.model.attention import SelfAttention
from omnivl.model.block import BlockLayer
from omnivl.model.config import ModelConfig
from omnivl.model.linear import LayerNorm
from omnivl.model.padding import Padding
from omnivl.model.state import State, StepLayout

TEXT_EPS = 1e-12
TEXT_MODALITY = 1


class BertBlock(nn.Module):
    """One post-norm transformer block, without the chain around it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention = SelfAttention(config.hidden_size, config.num_heads)
        self.norm1 = LayerNorm(config.hidden_size, TEXT_EPS)
        self.ffn = build_feed_forward(config.ffn, config.hidden_size, config.inner_size)
        self.norm2 = LayerNorm(config.hidden_size, TEXT_EPS)

    def forward(self, x: Tensor, mask: Tensor, first_only: bool = False) -> FeedForwardOutput:
        """Advances ``x [R, L, D]``.

        Args:
            x: The text stream.
            mask: bool ``[R, L]``, true where there is a token.
            first_only: Whether only the first position is wanted: the result is ``[R, 1, D]``.
        """
        padding = None if first_only else Padding.worth_dropping(mask)
        x = x if padding is None else padding.drop(x)
        attended = self.attention.first(x, mask) if first_only else self.attention(x, mask, padding=padding)
        x = x[:, :1] if first_only else x
        x = self.norm1(x + F.dropout(attended, self.dropout, self.training))
        out: FeedForwardOutput = self.ffn(x, torch.full((), TEXT_MODALITY, device=x.device))
        y = self.norm2(x + F.dropout(out.y, self.dropout, self.training))
        return FeedForwardOutput(y if padding is None else padding.restore(y), out.losses, out.statistics)


class TextBlock(BlockLayer):
    """A BERT block on all text rows, and its momentum twin on the clean ones."""

    def __init__(self, index: int, config: ModelConfig, *, twin: bool = False) -> None:
        super().__init__(f"text_{index:02d}", config, BertBlock, twin=twin)
        self.may_shorten = index == config.text_layers - 1 and config.ffn.kind == "dense"

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are text rows."""
        return bool(layout.text)

    def forward(self, state: State) -> State:
        """Advances ``text`` and, in a step with momentum, ``momentum_text``."""
        if not self.acts(state.layout):
            return state
        mask = state["text_mask"]
        first_only = self.may_shorten and state.layout.class_only
        out = self.run(state["text"], mask, first_only)
        state = self.with_routing(state.updated(text=out.y), out)
        if state.layout.momentum:
            twin = self.run_twin(state["momentum_text"], mask[state.layout.text["clean"]], first_only)
            state = state.updated(momentum_text=twin.y)
        return state

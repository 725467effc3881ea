"""Gated cross-attention between the blocks of a frozen language model, and the rows of the two marks of documents.

Shapes: R rows, L token positions, B samples, M pictures of each, Q states of a picture, D width of the language model,
D_v of the pictures, V words.

Source: Alayrac et al., Flamingo, arXiv 2204.14198, section 3.1.2, figure 4 and equation 2; numbers as in
    OpenFlamingo's code.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.working import keep_exact, working
from omnivl.chain.flops import num_rows, written
from omnivl.chain.state import State, StepLayout
from omnivl.data.documents import ADDED
from omnivl.parts.block import BlockLayer
from omnivl.parts.language import LanguageModel, LanguageTables
from omnivl.parts.linear import draw_normal, linear
from omnivl.parts.resampler import AttentionHeads, WideAttention, WideFeedForward


def see_pictures(pictures: Tensor, number: int, queries: int, every: bool) -> Tensor:
    """What each token sees of its document's pictures, bool ``[R, L, M * Q]``.

    Args:
        pictures: int64 ``[R, L]``, how many pictures stand before each token or at it.
        number: M.
        queries: Q.
        every: Whether a token sees all of these pictures; else it sees the last of them.
    """
    places = torch.arange(number, device=pictures.device).repeat_interleave(queries)
    last = pictures[..., None] - 1
    return places <= last if every else places == last


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward layer, each behind a gate that starts closed."""

    def __init__(self, size: int, memory_size: int, heads: AttentionHeads) -> None:
        """Builds it.

        Args:
            size: D.
            memory_size: D_v.
            heads: Of the attention.
        """
        super().__init__()
        self.attention, self.ffn = WideAttention(size, memory_size, heads), WideFeedForward(size)
        self.attention_gate, self.ffn_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The gates."""
        yield from (self.attention_gate, self.ffn_gate)

    def forward(self, x: Tensor, memory: Tensor, rows: Tensor | None, sees: Tensor) -> Tensor:
        """Advances ``x [R, L, D]``.

        Args:
            x: The stream.
            memory: ``[B, M * Q, D_v]``.
            rows: int64 ``[R]``, the sample of each row; None: row i is of sample i.
            sees: bool ``[R, L, M * Q]``. A position that sees nothing gets nothing from attention.
        """
        kv = self.attention.kv(memory)
        kv = kv if rows is None else kv.index_select(0, rows)
        some = sees.any(-1, keepdim=True)
        attended = self.attention.attend(self.attention.q(self.attention.norm(x)), kv, sees | ~some)
        x = x + working(self.attention_gate, x.dtype).tanh() * attended.masked_fill(~some, 0.0)
        advanced: Tensor = x + working(self.ffn_gate, x.dtype).tanh() * self.ffn(x)
        return advanced


class GatedLayer(BlockLayer):
    """A gated block before a block of the language model, on rows that look at ``pictures``.

    A segment's ``{segment}/pictures``, int64 ``[R, L]``, says how many pictures stand before each token or at it.
    """

    stack = "gated"

    def __init__(
        self, index: int, language: LanguageModel, memory_size: int, heads: AttentionHeads, queries: int, every: bool
    ) -> None:
        """Builds the layer.

        Args:
            index: Of the block of the language model behind it.
            language: Its sizes.
            memory_size: D_v.
            heads: Of the attention.
            queries: Q.
            every: Whether tokens see all pictures before them; else they see the last one.
        """
        size, blocks = language.blocks.hidden_size, language.blocks
        super().__init__(f"{self.stack}_{index:02d}", lambda still: GatedBlock(size, memory_size, heads))
        self.level, self.length, self.queries, self.every = index, language.length, queries, every
        self.recomputes = blocks.at_block(index).recompute == "block"

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are rows that look at pictures."""
        return bool(layout.language) and "interleaved" in layout.reads

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all rows."""
        assert isinstance(self.block, GatedBlock)
        if not self.acts(layout):
            return 0.0
        seen = self.queries * (1 if layout.is_video else layout.num_frames)
        read, attention = written(self.length, tokens), self.block.attention
        row = attention.flops(read, seen) + read * self.block.ffn.flops
        samples = layout.batch_size * attention.project_flops(seen)
        return self.backward.passes * (num_rows(layout.language) * row + samples)

    def forward(self, state: State) -> State:
        """Advances ``language``."""
        layout = state.layout
        if not self.acts(layout):
            return state
        memory = state["pictures"]
        counts = torch.cat([_pictures_of(state, name) for name in layout.language])
        sees = see_pictures(counts, memory.shape[1] // self.queries, self.queries, self.every)
        rows = state.get("join/rows")
        if rows is None and len(layout.language) > 1:
            rows = torch.arange(len(memory), device=memory.device).repeat(len(layout.language))
        return state.updated(language=self.run(state["language"], memory, rows, sees))


def _pictures_of(state: State, segment: str) -> Tensor:
    """``{segment}/pictures``; texts that name no pictures look at none."""
    found = state.get(f"{segment}/pictures")
    return torch.zeros_like(state[f"{segment}/token_ids"]) if found is None else found


class DocumentTables(LanguageTables):
    """The tables of a language model, and a row for each mark of documents in a table of their own.

    A stage can keep the words and train the marks.
    """

    def __init__(self, language: LanguageModel) -> None:
        super().__init__(language)
        self.added = nn.Parameter(torch.empty(ADDED, language.blocks.hidden_size))
        draw_normal(self.added, std=0.02)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The tables of a language model, and the rows of the marks."""
        yield from super().undecayed()
        yield self.added

    def embed(self, token_ids: Tensor) -> Tensor:
        """See ``LanguageTables``; marks have the negative ids of ``omnivl.data.documents``."""
        keep_exact(self.added)
        words = super().embed(token_ids.clamp(min=0))
        added = F.embedding((token_ids + ADDED).clamp(0, ADDED - 1), self.added)
        return torch.where((token_ids < 0)[..., None], added, words.to(added.dtype))

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V + 2]``, those of the marks last."""
        return torch.cat([super().project(hidden), linear(hidden, self.added)], dim=-1)

"""The lower half of a causal text decoder, which sees no picture: its states are both pooled and written on.

Shapes: R rows, L text positions, S = L + 1 positions of a row with its closing token (L + 2 where ``released`` and no
text is as long as any may be), D hidden size.

A learnt token closes each text. Attention is causal, so that the token's last state stands for the whole text, for
contrast, and the states before it are what an upper half with cross-attention goes on from: one pass serves both. The
token stands right behind the text, and padding behind it, which nobody sees; its position is the one behind the longest
text, whatever the text's length.

Source: Yu et al., CoCa, arXiv 2205.01917, section 3.2 (decoupled text decoder); numbers as in open_clip, whose token
    stands behind the padding, which it does not see.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.slot import FeedForwardOutput
from moe.working import working
from omnivl.chain.backward import TEXT
from omnivl.chain.demands import CLEAN
from omnivl.chain.flops import num_rows, written
from omnivl.chain.positions import chosen_positions, kept_name, kept_positions
from omnivl.chain.state import State, StepLayout, part
from omnivl.data.special_tokens import SpecialTokens
from omnivl.parts.attention import self_attention
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.language import DecoderBlock
from omnivl.parts.linear import LayerNorm, draw_normal
from omnivl.parts.padding import Padding
from omnivl.parts.poolers import contrast_name
from omnivl.parts.ragged import kept_visual_positions
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.starts import OneStartEmbedding
from omnivl.parts.towers import EmbedTowers, words_of

Closing = Literal["own", "released"]
"""What the closing token attends to: the text and itself (``own``); or the text and one padding behind it, and itself
only where the text has the greatest length (``released``)."""

KEYS, WORDS = "closing/keys", "closing/words"
"""Bool ``[R, S]``, only where ``released``: what may be attended to; bool ``[R, L]``: where there is a token."""


def goes_on(layout: StepLayout) -> bool:
    """Whether generated texts go on from the states of the clean ones, instead of passing the lower half themselves."""
    written = [layout.joins[name] for name in layout.generation]
    alone = len(written) == 1 and written[0].continues and written[0].times == 1
    return alone and CLEAN in layout.text and layout.mode == "train"


def starts(layout: StepLayout) -> bool:
    """Whether generated texts pass the lower half themselves."""
    return bool(layout.generation) and not goes_on(layout)


class ClosedTextEmbedding(OneStartEmbedding):
    """Word plus position, and the closing token with its position."""

    def __init__(self, words: Words, text: Transformer, tokens: SpecialTokens) -> None:
        super().__init__(words, text, tokens)
        self.closing = nn.Parameter(torch.empty(text.hidden_size))
        draw_normal(self.closing, std=0.02)

    def closed(self, words: Tensor, places: Tensor) -> Tensor:
        """Puts the closing token into rows of padded texts.

        Args:
            words: ``[R, S, D]``.
            places: int64 ``[R]``, the position of each row's token.
        """
        here = torch.arange(words.shape[1], device=words.device) == places[:, None]
        token = F.dropout(working(self.closing, words.dtype).expand(len(words), 1, -1), self.dropout, self.training)
        return torch.where(here[..., None], token, words)


class EmbedClosed(EmbedTowers):
    """Pixels and token ids to the start of each stream; texts are closed by a token.

    Adds ``closing/words`` and, where ``released``, ``closing/keys``; ``text_mask`` includes the closing token.
    """

    def __init__(
        self,
        patches: Patches,
        vision: Transformer,
        words: Words,
        text: Transformer,
        tokens: SpecialTokens,
        dtype: torch.dtype,
        closing: Closing,
    ) -> None:
        """Builds the embeddings.

        Args:
            patches: Sizes of pictures and patches.
            vision: The stack that reads the patches.
            words: Of the texts.
            text: The stack that reads the words.
            tokens: Special tokens of the tokenizer.
            dtype: The compute dtype.
            closing: What the closing token attends to.
        """
        embed = partial(ClosedTextEmbedding, tokens=tokens)
        reads = partial(torch.ne, other=tokens.pad)
        super().__init__(patches, vision, words, text, reads, dtype, bias=False, embed_texts=embed)
        self.closing, self.pad, self.longest = closing, tokens.pad, words.length

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """See ``ChainLayer``."""
        kept = kept_positions(state, self.reads, ()) | kept_visual_positions(
            state, state.layout.num_frames, "frame by frame"
        )
        if state.layout.text:
            mask = self._rows(words_of(state, state.layout.text))[1]
            chosen = chosen_positions(mask)
            if len(chosen) < mask.numel():
                kept[kept_name("text")] = chosen
        return kept

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The embedding of an encoder that no step uses; the closing token where texts are only written."""
        yield from super().idle_parameters(layouts)
        if any(layout.generation for layout in layouts) and not any(layout.text for layout in layouts):
            yield self.texts.closing

    @property
    def texts(self) -> ClosedTextEmbedding:
        """The embedding of texts."""
        embedding = self.block.get_submodule("text")
        assert isinstance(embedding, ClosedTextEmbedding)
        return embedding

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if goes_on(layout):  # the clean texts' states will be theirs
            own = super().forward(State(state, replace(layout, generation={})))
            mask = self.reads(words_of(state, [layout.joins[name].text for name in layout.generation]))
            made = State(own, layout).updated(generation_mask=mask)
        else:
            made = super().forward(state)
        if not layout.text:
            return made
        token_ids = words_of(state, layout.text)
        places, mask = self._rows(token_ids)
        words = made["text"]
        if mask.shape[1] - words.shape[1] > 1:  # a padding that is seen
            padding = token_ids.new_full((len(words), 1), self.pad)
            words = torch.cat([words, self.texts(padding, self.dtype, token_ids.shape[1])], dim=1)
        closed = self.texts.closed(F.pad(words, (0, 0, 0, 1)), places)
        found = {"text": closed, "text_mask": mask, WORDS: made["text_mask"]}
        if self.closing == "released":
            # As in the released code, each position is seen if the one before it is a word.
            keys = F.pad(made["text_mask"], (1, 0), value=True)
            found[KEYS] = F.pad(keys, (0, mask.shape[1] - keys.shape[1]), value=False)
        return made.merged(found)

    def _rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where texts ``[R, L]`` are closed, int64 ``[R]``, and the positions to compute, bool ``[R, S]``."""
        length = token_ids.shape[1]
        numbers = torch.arange(1, length + 1, device=token_ids.device)
        places = (self.reads(token_ids) * numbers).amax(1)  # behind the last token
        if self.closing == "released":
            places, length = (places + 1).clamp(max=self.longest), min(length + 1, self.longest)
        return places, torch.arange(length + 1, device=token_ids.device) <= places[:, None]


class UnimodalBlock(DecoderBlock):
    """A pre-norm causal block; what leaves the last one is not normalised."""

    def __init__(self, sizes: Transformer, index: int = 0) -> None:
        super().__init__(sizes, index)
        self.norm_out = nn.Identity()

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, keys: Tensor | None = None, kept: Tensor | None = None
    ) -> FeedForwardOutput:
        """Advances ``x [R, S, D]``.

        Args:
            x: The text stream.
            mask: bool ``[R, S]``, true where there is a token.
            keys: bool ``[R, S]``, the positions that may be attended to, each by itself and later ones; None: all.
            kept: int64 ``[n]``, the positions to compute where they are known.
        """
        if keys is None:
            return super().forward(x, mask, kept=kept)
        padding = Padding.worth_dropping(mask, kept)
        x = x if padding is None else padding.drop(x)
        attention = self.attention
        qkv: Tensor = attention.qkv(self.enter(self.norm1, x))
        rows = qkv if padding is None else padding.restore(qkv)
        attended = recomputed(attention.recompute, self_attention, rows, attention.num_heads, keys, True)
        x = self.leave(self.norm1, x, attention.out(attended if padding is None else padding.drop(attended)))
        x, out = self.feed(self.norm2, x, self.tokens(x, mask, padding, causal=True))
        return FeedForwardOutput(x if padding is None else padding.restore(x), out.router_sums)


class UnimodalLayer(StackBlock):
    """A block of the lower half, on closed texts and on texts that are written without them.

    If decoding keeps a cache, the block stores the keys and values of generated rows in ``cache/{layer}/self``.
    """

    stack = branch = TEXT

    def __init__(self, index: int, sizes: Transformer, length: int) -> None:
        """Builds block ``index`` of the lower half, for texts of up to ``length`` positions."""
        super().__init__(index, sizes, lambda own: UnimodalBlock(own, index))
        self.length = length

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are texts."""
        return bool(layout.text) or starts(layout)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all rows."""
        assert isinstance(self.block, UnimodalBlock)
        read = 1 + (self.length if tokens is None else tokens)
        total = num_rows(layout.text) * self.block.flops(read, 1 + self.length, first_only=False)
        for name, rows in layout.generation.items() if starts(layout) else ():
            length = layout.joins[name].length
            own = written(self.length, tokens, length), self.length if length is None else length
            total += num_rows({name: rows}) * self.block.flops(*own, first_only=False)
        return self.backward.passes * total

    def forward(self, state: State) -> State:
        """Advances ``text``, and ``generation`` unless it goes on from the former."""
        layout, block = state.layout, self.block
        assert isinstance(block, UnimodalBlock)
        if not self.acts(layout):
            return state
        if "cache/rows" in state:
            name = f"cache/{self.name}/self"
            out, past = block.decode(state["generation"], state.get(name))
            return state.merged({"generation": out.y, name: past})
        if layout.text:
            out = self.run(state["text"], state["text_mask"], state.get(KEYS), state.get(kept_name("text")))
            state = self.with_routing(state.updated(text=out.y), out.router_sums)
        if starts(layout):
            kept = state.get(kept_name("generation"))
            out = self.run(state["generation"], state["generation_mask"], None, kept)
            state = self.with_routing(state.updated(generation=out.y), out.router_sums)
        return state


class CloseTexts(BlockLayer):
    """The end of the lower half: its normalisation, the states of closing tokens, and those that are written on.

    Adds ``contrast/text``, which the projection reads, and ``generation`` where it goes on from ``text``. ``text`` is
    normalised and has its L positions again, or one where only that is read.
    """

    stack = branch = TEXT

    def __init__(self, sizes: Transformer) -> None:
        super().__init__("text_norm", lambda still: LayerNorm(sizes.hidden_size, sizes.norm_eps))

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are closed texts."""
        return bool(layout.text)

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        text, words, places = state["text"], state[WORDS], state["text_mask"].sum(1) - 1
        length, made = words.shape[1], dict[str, Tensor]()
        if goes_on(layout):
            made["generation"] = part(text, layout.text[CLEAN])[:, :length]
        pooled = self.run(text.gather(1, places[:, None, None].expand(-1, 1, text.shape[-1])))
        made |= {contrast_name("text"): pooled[:, 0], "text_mask": words}
        made["text"] = self.run(text[:, :length]) if _reads_words(layout) else pooled
        return state.merged(made, drop=(WORDS, KEYS))


def _reads_words(layout: StepLayout) -> bool:
    """Whether the states of words are read, and not only those of closing tokens."""
    if layout.class_only or layout.mode == "encode":
        return not layout.class_only
    own = layout.text.keys() - {CLEAN} - set(layout.embedded_texts)
    return bool(own) or "text" in layout.fields

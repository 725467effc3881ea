"""BLIP's mixture of encoder and decoder: one BERT that reads texts alone, beside a picture, and writes them.

Shapes: R rows, L text positions, S visual positions, D hidden size of texts, D_visual that of the image encoder.

A block advances three groups of rows:

- ``text``: self-attention over all words and the feed-forward layer, without cross-attention;
- ``fused``: the same self-attention, cross-attention to visual features, and the feed-forward layer;
- ``generation``: causal self-attention of its own; cross-attention and the feed-forward layer are those of ``fused``.

Fused rows begin at the word embeddings, with a learnt vector in place of their first token's. The blocks run twice, as
those of ``omnivl.parts.qformer``: a row of the second pass may join a text or an image with another sample's, drawn by
the similarities that the first pass gives.

Source: Li et al., BLIP, arXiv 2201.12086, section 3.1 and figure 2; what is shared as in its released code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import TWIN
from omnivl.chain.flops import num_rows, twin_rows, written
from omnivl.chain.positions import kept_name, kept_positions
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import SelfAttention
from omnivl.parts.block import StackBlock
from omnivl.parts.decoder import GroundedBlock
from omnivl.parts.embed import TextEmbedding, encoded_rows, num_encoded
from omnivl.parts.join import JoinRows, Sides
from omnivl.parts.linear import LayerNorm, draw_normal
from omnivl.parts.padding import Padding
from omnivl.parts.patches import visual_positions
from omnivl.parts.queries import texts_learn
from omnivl.parts.ragged import kept_visual_positions
from omnivl.parts.sizes import MomentumConfig, Patches, Transformer, Words
from omnivl.parts.towers import EmbedTowers, Towers, words_of

UNDERWAY = "mixed/"
"""Prefix of ``text`` before the last block of the first pass, and of ``generation`` before the second pass."""


class MarkedEmbedding(TextEmbedding):
    """Word plus position; texts beside a picture begin with a learnt vector in place of their first word's."""

    def __init__(self, words: Words, text: Transformer) -> None:
        super().__init__(words, text)
        self.mark = nn.Parameter(torch.empty(text.hidden_size))
        draw_normal(self.mark, std=0.02)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The vector too."""
        yield from super().undecayed()
        yield self.mark

    def forward(self, token_ids: Tensor, dtype: torch.dtype, start: int = 0, marked: bool = False) -> Tensor:
        """See ``TextEmbedding``; ``marked``: whether the texts stand beside pictures."""
        if not marked:
            return super().forward(token_ids, dtype, start)
        words = F.embedding(token_ids[:, 1:], self.words)
        return self.placed(torch.cat([self.mark.expand(len(words), 1, -1), words], dim=1), dtype, start)


class EmbedMixed(EmbedTowers):
    """Pixels and token ids to the start of each stream.

    Adds ``visual``, ``text_mask``, ``mixed/text`` of rows that are read unjoined, ``text_input`` of all texts if some
    are joined, ``mixed/generation``, and the twins' streams.
    """

    def __init__(
        self,
        patches: Patches,
        vision: Transformer,
        words: Words,
        text: Transformer,
        pad: int,
        dtype: torch.dtype,
        momentum: MomentumConfig | None = None,
    ) -> None:
        """Builds the embeddings; see ``EmbedTowers``. ``pad`` is the padding token's id."""
        super().__init__(
            *(patches, vision, words, text, lambda ids: ids != pad, dtype),
            momentum=momentum,
            embed_texts=MarkedEmbedding,
        )

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """See ``ChainLayer``. Rows that are only joined go through no stream of their own."""
        layout, apart = state.layout, encoded_rows(state.layout, "text")
        texts = [name for name, own in layout.text.items() if apart.start <= own.start and own.stop <= apart.stop]
        return kept_positions(state, self.reads, texts) | kept_visual_positions(
            state, layout.num_frames, "frame by frame"
        )

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Embeddings that no loss depends on."""
        assert isinstance(self.block, Towers)
        text = self.block.text
        assert isinstance(text, MarkedEmbedding)
        if not any(layout.visual for layout in layouts):
            yield from self.block.visual.parameters()
        if not any(texts_learn(one) or one.fused or one.generation for one in layouts):
            yield from (text.words, text.positions, *text.norm.parameters())
        if not any(layout.fused for layout in layouts):
            yield text.mark

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        state = super().forward(state)
        made: dict[str, Tensor] = {}
        if layout.text:
            if num_encoded(layout, "text"):
                made[f"{UNDERWAY}text"] = state["text"][encoded_rows(layout, "text")]
            if layout.fused:
                assert isinstance(self.block, Towers)
                made["text_input"] = self.block.text(words_of(state, layout.text), self.dtype, marked=True)
        if layout.generation:
            made[f"{UNDERWAY}generation"] = state["generation"]
        return state.merged(made, drop=("text", "generation"))


class JoinWords(JoinRows):
    """Joins texts, as they enter the blocks, with visual features, and lets generated texts start."""

    def __init__(self, *args: object) -> None:
        """Describes the layer; see ``JoinRows``."""
        super().__init__(*args, joins_inputs=True)  # type: ignore[arg-type]

    def acts(self, layout: StepLayout) -> bool:
        """Whether anything is read after the encoders."""
        return super().acts(layout) or bool(layout.generation)

    def sides(self, state: State) -> Sides:
        """The visual features and the texts' embeddings."""
        return super().sides(state.updated(visual_input=state["visual"]))

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if super().acts(layout):
            state = super().forward(state)
        if layout.generation:
            state = state.merged({"generation": state[f"{UNDERWAY}generation"]}, drop=(f"{UNDERWAY}generation",))
        return state


@dataclass(frozen=True)
class Rows:
    """The rows that a block advances, and what they look at; None for a group without rows.

    Attributes:
        text: ``[R, L, D]``.
        text_mask: bool ``[R, L]``, true where there is a token.
        text_kept: int64 ``[n]``, the positions of ``text`` to compute where they are known.
        fused: ``[R, L, D]``.
        fused_mask: bool ``[R, L]``.
        fused_memory: int64 ``[R]``, the row of ``memory`` that each fused row looks at.
        generation: ``[R, L, D]``.
        generation_mask: bool ``[R, L]``.
        generation_kept: int64 ``[n]``, as ``text_kept``.
        generation_memory: int64 ``[R]``, as ``fused_memory``.
        memory: Visual features ``[R_memory, S, D_visual]``.
        memory_mask: bool ``[R_memory, S]``, which of them are no padding; None: all.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    text_kept: Tensor | None = None
    fused: Tensor | None = None
    fused_mask: Tensor | None = None
    fused_memory: Tensor | None = None
    generation: Tensor | None = None
    generation_mask: Tensor | None = None
    generation_kept: Tensor | None = None
    generation_memory: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None


class MixedBlock(GroundedBlock):
    """One block, without the chain around it. What it has beyond ``GroundedBlock`` is the writers' self-attention."""

    def __init__(self, sizes: Transformer, index: int, memory_size: int) -> None:
        """Builds the block.

        Args:
            sizes: Of its stack.
            index: Which block of the stack.
            memory_size: Width of the visual features.
        """
        super().__init__(sizes, causal=False, index=index, memory_size=memory_size)
        self.attention_written = SelfAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention")
        self.norm1_written = LayerNorm(sizes.hidden_size, sizes.norm_eps)

    @property
    def of_written(self) -> Iterator[nn.Parameter]:
        """Parameters that only generated rows use."""
        yield from (*self.attention_written.parameters(), *self.norm1_written.parameters())

    @property
    def of_grounded(self) -> Iterator[nn.Parameter]:
        """Parameters that only rows beside visual features use."""
        yield from (*self.cross.parameters(), *self.norm2.parameters())

    @property
    def of_read(self) -> Iterator[nn.Parameter]:
        """Parameters of the self-attention over all words."""
        yield from (*self.attention.parameters(), *self.norm1.parameters())

    @property
    def of_all(self) -> Iterator[nn.Parameter]:
        """Parameters that all rows use."""
        yield from (*self.ffn.parameters(), *self.norm3.parameters(), *self.norm_out.parameters())

    def forward(self, rows: Rows) -> Rows:  # type: ignore[override]
        """Advances all rows."""
        text, fused, generation = rows.text, rows.fused, rows.generation
        if text is not None:
            text = self.read(text, rows.text_mask, rows.text_kept)
        if fused is None and generation is None:
            return replace(rows, text=text)
        assert rows.memory is not None, "fused and generated rows look at visual features"
        kv, seen = self.project(rows.memory), rows.memory_mask
        if fused is not None:
            padding = Padding.worth_dropping(rows.fused_mask, None)
            fused = self._grounded(fused, rows.fused_mask, padding, kv, rows.fused_memory, seen, writes=False)
        if generation is not None:
            if rows.generation_memory is None and len(kv) > len(generation):  # rows of other replicas follow
                kv, seen = kv[: len(generation)], None if seen is None else seen[: len(generation)]
            mask, padding = rows.generation_mask, Padding.worth_dropping(rows.generation_mask, rows.generation_kept)
            generation = self._grounded(generation, mask, padding, kv, rows.generation_memory, seen, writes=True)
        return replace(rows, text=text, fused=fused, generation=generation)

    def read(self, x: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
        """Advances texts ``x [R, L, D]`` alone; see ``Rows``."""
        padding = Padding.worth_dropping(mask, kept)
        x = self._attended(x if padding is None else padding.drop(x), mask, padding, writes=False)
        x, _ = self.feed(self.norm3, x, self.tokens(x, mask, padding))
        y: Tensor = self.norm_out(x)
        return y if padding is None else padding.restore(y)

    def _grounded(
        self,
        x: Tensor,
        mask: Tensor | None,
        padding: Padding | None,
        kv: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None,
        *,
        writes: bool,
    ) -> Tensor:
        """Advances texts ``x [R, L, D]`` beside visual features; see ``GroundedBlock.forward``."""
        x = self._attended(x if padding is None else padding.drop(x), mask, padding, writes=writes)
        y = self._after_self_attention(x, kv, rows, memory_mask, mask, padding).y
        return y if padding is None else padding.restore(y)

    def _attended(self, x: Tensor, mask: Tensor | None, padding: Padding | None, *, writes: bool) -> Tensor:
        """The stream after the self-attention of readers, or that of writers."""
        if writes:
            attended = self.attention_written(self.enter(self.norm1_written, x), None, True, padding)
            return self.leave(self.norm1_written, x, attended)
        return self.leave(self.norm1, x, self.attention(self.enter(self.norm1, x), mask, False, padding))

    def write(
        self, x: Tensor, past: Tensor | None, kv: Tensor, rows: Tensor | None, memory_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Advances the last positions of generated texts; see ``GroundedBlock.decode``."""
        attended, past = self.attention_written.extend(self.enter(self.norm1_written, x), past)
        x = self.leave(self.norm1_written, x, attended)
        return self._after_self_attention(x, kv, rows, memory_mask).y, past


class MixedLayer(StackBlock):
    """A block in the chain, which runs it twice, and its momentum twin, which reads texts alone in the first pass.

    The first pass advances ``mixed/text``, which the last block leaves as ``text``; the second one ``fused`` and
    ``generation``. Row b of ``generation`` looks at row b of ``memory``, or at row ``generation_memory[b]``. If
    decoding keeps a cache, it looks at row ``cache/rows[b]``, and the block stores its keys and values in
    ``cache/{layer}/self`` and ``cache/{layer}/cross``.
    """

    stack = "mixed"

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        patches: Patches,
        *,
        memory_size: int,
        length: int,
        momentum: MomentumConfig | None = None,
    ) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the stack.
            patches: Sizes of pictures and patches.
            memory_size: Width of the visual features.
            length: L.
            momentum: Of its twin; None builds none.
        """
        super().__init__(index, sizes, lambda own: MixedBlock(own, index, memory_size), momentum)
        self.is_last, self.patches, self.length = index == sizes.layers - 1, patches, length

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are rows of any group."""
        return any(self.acts_on_pass(layout, number) for number in (0, 1))

    def acts_on_pass(self, layout: StepLayout, number: int) -> bool:
        """The first pass advances texts alone, the second one rows beside pictures."""
        if number > 0:
            return bool(layout.fused or layout.generation)
        return bool(num_encoded(layout, "text"))

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on texts alone and their twins; in the second pass on fused and generated rows."""
        block, length = self.block, self.length
        assert isinstance(block, MixedBlock)
        tokens = length if tokens is None else tokens
        if number == 0:
            one = block.attention.flops(tokens, length) + tokens * block.slot_flops
            passes = self.backward.passes if texts_learn(layout) else 1
            return one * (num_encoded(layout, "text") * passes + twin_rows(layout, "text"))
        seen = visual_positions(self.patches, layout)
        total = layout.batch_size * block.cross.project_flops(seen) * self.acts_on_pass(layout, 1)
        total += num_rows(layout.fused) * block.flops(tokens, length, seen)
        for name, own in layout.generation.items():
            count = layout.joins[name].length
            sizes = written(length, tokens, count), length if count is None else count
            total += num_rows({name: own}) * block.flops(*sizes, seen)
        return self.backward.passes * total

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters that no loss depends on."""
        block = self.block
        assert isinstance(block, MixedBlock)
        reads = any(texts_learn(layout) or layout.fused for layout in layouts)
        writes = any(layout.generation for layout in layouts)
        if not writes:
            yield from block.of_written
        if not any(layout.fused or layout.generation for layout in layouts):
            yield from block.of_grounded
        if not reads:
            yield from block.of_read
        if not reads and not writes:
            yield from block.of_all

    def forward(self, state: State) -> State:
        """See the class."""
        layout, waiting = state.layout, f"{UNDERWAY}text"
        if waiting in state:
            mask = state["text_mask"][encoded_rows(layout, "text")]
            made = self.run(Rows(text=state[waiting], text_mask=mask, text_kept=state.get(kept_name("text"))))
            name = "text" if self.is_last else waiting
            state = state.merged({name: made.text}, drop=(waiting,) if self.is_last else ())
            if "text" in layout.twins:
                own = state.of_twins("text_mask", "text")
                twin = Rows(state["momentum_text"], own, state.get(kept_name(f"{TWIN}text")))
                state = state.updated(momentum_text=self.run_twin(twin).text)
            return state
        if "cache/rows" in state and "generation" in state:
            return self._decoded(state)
        groups = [name for name in ("fused", "generation") if name in state]
        if not groups:
            return state
        names = [*groups, "memory", *(f"{name}_mask" for name in groups), *(f"{name}_memory" for name in groups)]
        given = {name: state.get(name) for name in (*names, "memory_mask")}
        made = self.run(Rows(**given, generation_kept=state.get(kept_name("generation"))))
        return state.merged({name: getattr(made, name) for name in groups})

    def _decoded(self, state: State) -> State:
        assert isinstance(self.block, MixedBlock)
        past_name, cross_name = f"cache/{self.name}/self", f"cache/{self.name}/cross"
        kv = state[cross_name] if cross_name in state else self.block.project(state["memory"])
        seen = state["cache/rows"], state.get("memory_mask")
        words, past = self.block.write(state["generation"], state.get(past_name), kv, *seen)
        return state.merged({"generation": words, past_name: past, cross_name: kv})

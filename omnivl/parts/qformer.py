"""The Q-Former: BERT's blocks over learnt queries and words, with one set of weights and a mask for each use.

Shapes: B samples, Q queries, L text positions, S visual positions, R rows, D hidden size.

A block advances four groups of rows, all with the same self-attention:

- ``queries`` alone, ``[B, Q, D]``;
- ``text`` alone, ``[R, L, D]``: each word sees all words;
- ``generation``, ``[R, L, D]``: each word sees the queries of its sample in the same block, and earlier words. Queries
  see no word;
- ``fused``, ``[R, Q + L, D]``: queries and words see each other.

Queries attend to visual features in every ``cross_every``-th block, starting with the first, and have a separate
feed-forward layer; words do not attend to visual features. Post-norm.

The blocks run twice, as those of ``omnivl.parts.unified``: the second pass joins a text or image with another sample's,
which is drawn by the similarities that the first pass gives.

Source: Li et al., BLIP-2, arXiv 2301.12597, section 3.1 and figure 2; numbers as in its released code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe.feed_forward import build_feed_forward
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Tokens
from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import CrossAttention, SelfAttention, self_attention
from omnivl.parts.bert import TEXT_MODALITY, ResidualBlock
from omnivl.parts.block import StackBlock
from omnivl.parts.embed import encoded_rows, num_encoded
from omnivl.parts.linear import LayerNorm
from omnivl.parts.patches import num_patches
from omnivl.parts.queries import UNDERWAY, gathers, queries_are_read, queries_learn, texts_learn
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MODALITIES, Patches, Transformer

QUERY_MODALITY = "image"
GROUPS = ("queries", "text", "generation")
"""The groups that the first pass advances."""


@dataclass(frozen=True)
class Rows:
    """The rows that a block advances; None for a group without rows.

    Attributes:
        queries: ``[B, Q, D]``.
        text: ``[R, L, D]``.
        text_mask: bool ``[R, L]``, true where there is a token.
        generation: ``[R, L, D]``, R a multiple of B: one or more segments of B rows.
        fused: ``[R, Q + L, D]``.
        fused_mask: bool ``[R, Q + L]``.
        fused_memory: int64 ``[R]``, the row of ``memory`` that each fused row looks at.
        memory: Visual features ``[R_memory, S, D_visual]``; ``queries`` look at row b each.
        memory_mask: bool ``[R_memory, S]``, which of them are no padding; None: all.
    """

    queries: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    generation: Tensor | None = None
    fused: Tensor | None = None
    fused_mask: Tensor | None = None
    fused_memory: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """What queries look at.

    Attributes:
        kv: Keys and values of visual features, ``[R_memory, S, 2 D]``.
        mask: bool ``[R_memory, S]``, which of them are no padding; None: all.
    """

    kv: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Wanted:
    """The rows that are read after a block; for all blocks but the last one, all.

    Attributes:
        queries: Queries alone; if false, generated words still see their keys.
        fused_queries: The queries of fused rows.
        fused_text: The words of fused rows.
    """

    queries: bool = True
    fused_queries: bool = True
    fused_text: bool = True


class QueryingBlock(ResidualBlock):
    """One block, without the chain around it."""

    def __init__(self, sizes: Transformer, index: int, queries: int, looks: bool, memory_size: int) -> None:
        """Builds the block.

        Args:
            sizes: Of its stack.
            index: Which block of the stack.
            queries: Q.
            looks: Whether queries attend to visual features.
            memory_size: Width of these.
        """
        super().__init__(sizes, index)
        size, slot = sizes.hidden_size, Slot(index, (TEXT_MODALITY,), MODALITIES, depth=sizes.layers)
        self.num_queries, recompute = queries, sizes.recompute == "attention"
        self.attention = SelfAttention(size, sizes.num_heads, recompute)
        self.norm1 = LayerNorm(size, sizes.norm_eps)
        self.cross = CrossAttention(size, sizes.num_heads, recompute, memory_size) if looks else None
        self.norm2 = LayerNorm(size, sizes.norm_eps) if looks else None
        self.ffn = build_feed_forward(sizes.ffn, size, sizes.inner_size, slot)
        self.norm3 = LayerNorm(size, sizes.norm_eps)
        self.ffn_query = build_feed_forward(
            sizes.ffn, size, sizes.inner_size, replace(slot, modalities=(QUERY_MODALITY,))
        )
        self.norm3_query = LayerNorm(size, sizes.norm_eps)

    @property
    def of_queries(self) -> Iterator[nn.Parameter]:
        """Parameters that only queries use."""
        for module in (self.cross, self.norm2, self.ffn_query, self.norm3_query):
            if module is not None:
                yield from module.parameters()

    @property
    def of_words(self) -> Iterator[nn.Parameter]:
        """Parameters that only words use."""
        yield from (*self.ffn.parameters(), *self.norm3.parameters())

    def forward(self, rows: Rows, wanted: Wanted) -> Rows:
        """Advances all rows; unwanted ones are None, or missing in ``fused``."""
        looking = (rows.queries is not None and wanted.queries) or (rows.fused is not None and wanted.fused_queries)
        seen = None
        if self.cross is not None and looking:
            assert rows.memory is not None, "queries look at visual features"
            seen = Seen(self.cross.project(rows.memory), rows.memory_mask)
        queries, kv = (None, None) if rows.queries is None else self.gather(rows.queries, seen, wanted.queries)
        text, generation, fused = rows.text, rows.generation, rows.fused
        if text is not None:
            text = self._words(self.leave(self.norm1, text, self.attention(text, rows.text_mask)))
        if generation is not None:
            assert kv is not None, "written words see queries"
            generation, _ = self.write(generation, kv.repeat(len(generation) // len(kv), 1, 1), None)
        if fused is not None:
            fused = self.leave(self.norm1, fused, self.attention(fused, rows.fused_mask))
            ahead, words = fused[:, : self.num_queries], fused[:, self.num_queries :]
            parts = [self._queries(ahead, seen, rows.fused_memory)] if wanted.fused_queries else []
            parts += [self._words(words)] if wanted.fused_text else []
            fused = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return replace(rows, queries=queries, text=text, generation=generation, fused=fused)

    def gather(self, queries: Tensor, seen: Seen | None, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """Advances ``queries [B, Q, D]`` alone.

        Args:
            queries: See above.
            seen: Visual features.
            wanted: Whether the result is wanted; else it is None.

        Returns:
            The advanced queries, and their keys and values for generated words, ``[B, Q, 2 D]``.
        """
        attention = self.attention
        qkv: Tensor = attention.qkv(queries)
        kv = qkv[..., queries.shape[-1] :]
        if not wanted:
            return None, kv
        attended = attention.out(recomputed(attention.recompute, self_attention, qkv, attention.num_heads))
        return self._queries(self.leave(self.norm1, queries, attended), seen, None), kv

    def write(self, words: Tensor, kv: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Advances the last words ``[R, l, D]`` of generated texts.

        Args:
            words: See above.
            kv: Keys and values of the queries, ``[R, Q, 2 D]``.
            past: Those of the earlier words, ``[R, L - l, 2 D]``; None at the start.

        Returns:
            The words, and the keys and values of all words, ``[R, L, 2 D]``.
        """
        before = kv if past is None else torch.cat([kv, past], dim=1)
        attended, known = self.attention.extend(words, before)
        return self._words(self.leave(self.norm1, words, attended)), known[:, kv.shape[1] :]

    def _queries(self, x: Tensor, seen: Seen | None, rows: Tensor | None) -> Tensor:
        if self.cross is not None:
            assert self.norm2 is not None
            assert seen is not None, "queries look at visual features"
            x = self.leave(self.norm2, x, self.cross(x, seen.kv, rows, mask=seen.mask))
        return self._fed(self.ffn_query, self.norm3_query, x, QUERY_MODALITY)

    def _words(self, x: Tensor) -> Tensor:
        return self._fed(self.ffn, self.norm3, x, TEXT_MODALITY)

    def _fed(self, ffn: nn.Module, norm: nn.Module, x: Tensor, modality: str) -> Tensor:
        out: FeedForwardOutput = recomputed(self.recomputes_ffn, ffn, x, Tokens.of(modality, x))
        return self.leave(norm, x, out.y)


class QFormerLayer(StackBlock):
    """A block in the chain, which runs it twice.

    The first pass advances ``queries``, ``text`` and ``generation``, which have the prefix ``UNDERWAY`` until the last
    block has run; the second one ``fused``. If decoding keeps a cache, generated row r sees the queries of sample
    ``cache/rows[r]``, and the block stores the keys and values of words in ``cache/{layer}/self``, those of queries in
    ``cache/{layer}/cross``.
    """

    stack = "qformer"

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        patches: Patches,
        *,
        queries: int,
        cross_every: int,
        memory_size: int,
        length: int,
    ) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the stack.
            patches: Sizes of pictures and patches.
            queries: Q.
            cross_every: The first of every ``cross_every`` blocks attends to visual features.
            memory_size: Width of these.
            length: L.
        """
        looks = index % cross_every == 0
        super().__init__(index, sizes, lambda own: QueryingBlock(own, index, queries, looks, memory_size))
        self.is_last, self.queries = index == sizes.layers - 1, queries
        self.length, self.patches = length, patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are rows of any group."""
        return any(self.acts_on_pass(layout, number) for number in (0, 1))

    def acts_on_pass(self, layout: StepLayout, number: int) -> bool:
        """The first pass runs separate rows, the second joined ones."""
        if number > 0:
            return bool(layout.fused)
        return gathers(layout) or num_encoded(layout, "text") > 0

    def wanted(self, layout: StepLayout) -> Wanted:
        """The rows that are read after the block."""
        if not self.is_last:
            return Wanted()
        return Wanted(queries_are_read(layout), "pooled" in layout.reads, bool(layout.fused_text))

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the separate rows, in a second pass on the joined ones.

        Padding is included. Rows that are read only to draw samples have no backward pass.
        """
        block, wanted, images = self.block, self.wanted(layout), num_rows(layout.visual)
        assert isinstance(block, QueryingBlock)
        attention, count, length = block.attention, self.queries, self.length
        seen = layout.num_frames * (1 + num_patches(self.patches, layout))
        looking = 0.0 if block.cross is None else block.cross.flops(count, count, seen)
        projecting = 0.0 if block.cross is None else images * block.cross.project_flops(seen)
        querying, reading = looking + count * block.slot_flops, length * block.slot_flops
        if number > 0:
            row = attention.flops(count + length, count + length)
            row += querying * wanted.fused_queries + reading * wanted.fused_text
            looked_at = projecting * bool(layout.fused) * wanted.fused_queries
            return self.backward.passes * (num_rows(layout.fused) * row + looked_at)
        size, texts = attention.qkv.in_features, attention.flops(length, length) + reading
        total = self.backward.passes * num_rows(layout.generation) * (texts + 4 * length * count * size)
        total += num_encoded(layout, "text") * texts * (self.backward.passes if texts_learn(layout) else 1)
        if gathers(layout):
            whole = projecting + images * (attention.flops(count, count) + querying)
            passes = self.backward.passes if queries_learn(layout) or layout.generation else 1
            total += passes * (whole if wanted.queries else images * count * 6 * size**2)
        return total

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters that no loss depends on: parts of the last block whose rows are not read after it."""
        block = self.block
        assert isinstance(block, QueryingBlock)
        queries = words = False
        for layout in layouts:
            wanted = self.wanted(layout)
            queries |= queries_learn(layout) or (bool(layout.generation) and not self.is_last)
            queries |= bool(layout.fused) and wanted.fused_queries
            words |= texts_learn(layout) or bool(layout.generation) or (bool(layout.fused) and wanted.fused_text)
        if not queries:
            yield from block.of_queries
        if not words:
            yield from block.of_words
        if not queries and not words:
            yield from (*block.attention.parameters(), *block.norm1.parameters())

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if "fused" in state:
            names = ("fused", "fused_mask", "fused_memory", "memory")
            joined = Rows(**{name: state[name] for name in names}, memory_mask=state.get("memory_mask"))
            made = self.run(joined, self.wanted(layout))
            return state.updated(fused=made.fused)
        groups = {name: state[UNDERWAY + name] for name in GROUPS if UNDERWAY + name in state}
        if not groups:
            return state
        if "cache/rows" in state and "generation" in groups:
            return self._decoded(state, groups)
        if "text" in groups:
            groups["text_mask"] = state["text_mask"][encoded_rows(layout, "text")]
        if "queries" in groups:
            from_tower = "visual" in state
            groups["memory"] = state["visual" if from_tower else "memory"]
            if (name := "visual_mask" if from_tower else "memory_mask") in state:
                groups["memory_mask"] = state[name]
        made = self.run(Rows(**groups), self.wanted(layout))
        return self._moved_on(state, {name: getattr(made, name) for name in GROUPS})

    def _moved_on(self, state: State, made: Mapping[str, Tensor | None]) -> State:
        """The state with the advanced streams; after the last block without the prefix ``UNDERWAY``."""
        name_of = "{}".format if self.is_last else (UNDERWAY + "{}").format
        moved = {name_of(name): rows for name, rows in made.items() if rows is not None}
        return state.merged(moved, drop=tuple(UNDERWAY + name for name in GROUPS))

    def _decoded(self, state: State, groups: Mapping[str, Tensor]) -> State:
        block, queries = self.block, groups.get("queries")
        assert isinstance(block, QueryingBlock)
        past_name, cross_name = f"cache/{self.name}/self", f"cache/{self.name}/cross"
        if cross_name in state:
            kv = state[cross_name]
        else:
            assert queries is not None, "queries start in the first call"
            seen = None
            if block.cross is not None:
                seen = Seen(block.cross.project(state["memory"]), state.get("memory_mask"))
            queries, kv = block.gather(queries, seen, self.wanted(state.layout).queries)
        words, past = block.write(groups["generation"], kv.index_select(0, state["cache/rows"]), state.get(past_name))
        kept = state.merged({past_name: past, cross_name: kv})
        return self._moved_on(kept, {"queries": queries, "generation": words})

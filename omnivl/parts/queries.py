"""The layers around a Q-Former in the chain: its embeddings, the join of its rows, and the pooling of joined rows.

Shapes: B samples, S visual positions, Q queries, L text positions, R rows, D hidden size of the Q-Former.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.chain import ChainLayer
from omnivl.chain.demands import CLEAN
from omnivl.chain.flops import num_rows
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Objective
from omnivl.chain.positions import ids_name
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.parts.block import EmbeddingLayer
from omnivl.parts.embed import TextEmbedding, encoded_rows
from omnivl.parts.join import JoinRows, Sides
from omnivl.parts.linear import draw_normal
from omnivl.parts.patches import num_patches
from omnivl.parts.plain_vit import ImageEmbedding
from omnivl.parts.ragged import kept_visual_positions, visual_mask
from omnivl.parts.sizes import Patches, Transformer, Words

INPUT = "queries/input"
"""The queries as they enter the Q-Former, float ``[1, Q, D]``, for joined rows."""
UNDERWAY = "qformer/"
"""Prefix of the name of a stream (``queries``, ``text``, ``generation``) before the last block has run. The second pass
of a block finds none."""


def gathers(layout: StepLayout) -> bool:
    """Whether queries attend to visuals without a text: to be read or projected, or for generated texts to see."""
    projected = bool(layout.visual) and layout.embeds
    return projected or bool(layout.generation) or "queries" in layout.fields


def queries_are_read(layout: StepLayout) -> bool:
    """Whether the final queries are read, with or without a gradient."""
    return (bool(layout.visual) and layout.embeds) or "queries" in layout.fields


def queries_learn(layout: StepLayout) -> bool:
    """Whether a loss reads the final queries."""
    return not layout.reads.isdisjoint({"visual_embedding", "queries"})


def texts_learn(layout: StepLayout) -> bool:
    """Whether a loss reads the final states of texts alone."""
    own = layout.text.keys() - {CLEAN} - layout.joined
    return bool(own) or not layout.reads.isdisjoint({"text_embedding", "text"})


class QueryingEmbeddings(nn.Module):
    """Embeddings of the visual tower and of words, and the learnt queries. One LayerNorm serves queries and words."""

    def __init__(self, patches: Patches, vision: Transformer, words: Words, qformer: Transformer, queries: int) -> None:
        super().__init__()
        self.visual = ImageEmbedding(patches, vision)
        self.text = TextEmbedding(words, qformer)
        self.queries = nn.Parameter(torch.empty(queries, qformer.hidden_size))
        draw_normal(self.queries, std=0.02)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The queries."""
        yield self.queries

    def normalised_queries(self, dtype: torch.dtype) -> Tensor:
        """``[1, Q, D]`` of ``dtype``."""
        normalised: Tensor = self.text.norm(self.queries)
        return normalised.to(dtype)[None]


class EmbedQuerying(EmbeddingLayer):
    """Pixels to the visual tower; queries and words to the Q-Former.

    Adds ``visual`` and ``text_mask``; if rows are joined, ``text_input`` of all texts and ``queries/input``; with the
    prefix ``qformer/`` the unjoined inputs of the Q-Former: ``text`` (rows that are read unjoined), ``generation``, and
    ``queries`` if they attend to visuals without a text. In decoding the visuals are those in ``memory``, and with a
    cache only the first call has queries.
    """

    def __init__(
        self,
        patches: Patches,
        vision: Transformer,
        words: Words,
        qformer: Transformer,
        queries: int,
        pad: int,
        dtype: torch.dtype,
    ) -> None:
        """Builds the embeddings.

        Args:
            patches: Sizes of pictures and patches.
            vision: The visual tower.
            words: Of the texts.
            qformer: The stack that reads words and queries.
            queries: Q.
            pad: The padding token's id.
            dtype: The compute dtype.
        """
        super().__init__(lambda still: QueryingEmbeddings(patches, vision, words, qformer, queries), dtype)
        self.sizes, self.pad, self.dropout = patches, pad, qformer.dropout

    def acts(self, layout: StepLayout) -> bool:
        """Whether a stream starts here."""
        return bool(layout.visual or layout.text or layout.generation) or gathers(layout)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the patches. No gradient flows into pixels: one product less."""
        assert isinstance(self.block, QueryingEmbeddings)
        one = self.block.visual.flops(layout.num_frames, num_patches(self.sizes, layout))
        return self.backward.passes_on_pixels * num_rows(layout.visual) * one

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters that no loss depends on."""
        block = self.block
        assert isinstance(block, QueryingEmbeddings)
        queries = any(queries_learn(one) or one.generation or one.fused for one in layouts)
        words = any(texts_learn(one) or one.generation or one.fused for one in layouts)
        if not any(layout.visual for layout in layouts):
            yield from block.visual.parameters()
        if not queries:
            yield block.queries
        if not words:
            yield from (block.text.words, block.text.positions)
        if not queries and not words:
            yield from block.text.norm.parameters()

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """See ``ChainLayer``. Texts are computed whole."""
        return kept_visual_positions(state, state.layout.num_frames, "frame by frame")

    def forward(self, state: State) -> State:
        """See the class."""
        layout, block, made = state.layout, self.block, dict[str, Tensor]()
        assert isinstance(block, QueryingEmbeddings)
        if layout.visual:
            made["visual"] = block.visual(state["frames"], self.dtype, state.get("grids"))
            made |= visual_mask(state, layout.num_frames, "frame by frame")
        if layout.text:
            token_ids = torch.cat([state[ids_name(name)] for name in layout.text])
            text, apart = block.text(token_ids, self.dtype), encoded_rows(layout, "text")
            made["text_mask"] = token_ids != self.pad
            made |= {"text_input": text} if layout.fused else {}
            made |= {UNDERWAY + "text": text[apart]} if apart.stop > apart.start else {}
        if layout.fused:
            made[INPUT] = block.normalised_queries(self.dtype)
        if gathers(layout) and not _knows_queries(state):
            rows = len(made["visual"] if layout.visual else state["memory"])
            queries = block.normalised_queries(self.dtype)
            made[UNDERWAY + "queries"] = _started(queries, rows, self.dropout, self.training)
        if layout.generation:
            _require_own_queries(layout)
            token_ids = torch.cat([state[ids_name(layout.joins[name].text)] for name in layout.generation])
            start = int(state["cache/start"]) if "cache/start" in state else 0
            made[UNDERWAY + "generation"] = block.text(token_ids, self.dtype, start)
        return state.merged(made)


def _require_own_queries(layout: StepLayout) -> None:
    """Refuses generated texts that see anything but their own sample's queries.

    Raises:
        ModelError: There is such a text.
    """
    for name in layout.generation:
        if (seen := layout.joins[name].seen) != (CLEAN,):
            raise ModelError(
                f"written text {name!r}: got a look at {', '.join(map(repr, seen))}; allowed is {CLEAN!r} where texts "
                "see queries; take the objective out or change model.kind"
            )


def _knows_queries(state: State) -> bool:
    return any(name.startswith("cache/") and name.endswith("/cross") for name in state)


def _started(queries: Tensor, rows: int, dropout: float, training: bool) -> Tensor:
    """A copy of ``queries [1, Q, D]`` for each of ``rows`` rows, each with its own dropout."""
    return F.dropout(queries.expand(rows, -1, -1), dropout, training)


class JoinQueries(JoinRows):
    """Joins texts, as they enter the Q-Former, with queries that look at visual features.

    ``fused [R, Q + L, D]`` begins with the queries; ``memory`` holds the output of the visual tower.
    """

    def __init__(self, objectives: Sequence[Objective], gather: Gather, dropout: float) -> None:
        """Describes the layer.

        Args:
            objectives: The stage's objectives, whose ``draw`` is called.
            gather: How to see the other replicas.
            dropout: Of the queries.
        """
        super().__init__(objectives, gather, joins_inputs=True)
        self.dropout = dropout

    def sides(self, state: State) -> Sides:
        """The visual features and the texts' embeddings."""
        return super().sides(state.updated(visual_input=state["visual"]))

    def forward(self, state: State) -> State:
        """See the class."""
        if not self.acts(state.layout):
            return state
        joined = super().forward(state)
        if not state.layout.fused:  # generated texts saw queries; nothing else reads the visual features
            return joined.updated(drop=("memory", "memory_mask", "generation_memory"))
        texts, mask = joined["fused"], joined["fused_mask"]
        queries = _started(joined[INPUT], len(texts), self.dropout, self.training)
        fused = torch.cat([queries, texts], dim=1)
        everywhere = mask.new_ones(queries.shape[:2])
        return joined.updated(drop=(INPUT,), fused=fused, fused_mask=torch.cat([everywhere, mask], dim=1))


class PoolQueries(ChainLayer):
    """Sets ``pooled`` to the mean of a joined row's queries, and keeps the texts' positions of ``fused``.

    A linear map of that mean is the mean of its values at the queries, by which BLIP-2 matches. ``fused`` is dropped if
    no loss reads words.
    """

    stack = "pool"

    def __init__(self, queries: int) -> None:
        """Describes the layer, which has no parameters, for rows with ``queries`` queries."""
        super().__init__()
        self.queries = queries

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are joined rows."""
        return bool(layout.fused)

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        fused, ahead = state["fused"], self.queries if "pooled" in layout.reads else 0
        made = {"pooled": fused[:, :ahead].mean(1)} if ahead else {}
        if not layout.fused_text:
            return state.merged(made, drop=("fused", "fused_mask"))
        return state.merged({**made, "fused": fused[:, ahead:], "fused_mask": state["fused_mask"][:, self.queries :]})

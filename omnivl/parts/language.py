"""A decoder-only language model as layers: prefix, embeddings, blocks, and the tied head.

Shapes: B samples, Q queries of a sample of width D_q, R rows, L token positions, P positions before them (of a prefix,
or 0), D hidden size, V words, n positions with a target.

A row is ``[prefix; tokens]``. Each position sees itself and earlier ones. Tokens are padded at the end.

Source: Zhang et al., OPT, arXiv 2205.01068; numbers as in its released code (pre-norm, ReLU, eps 1e-5, learnt
    positions, whose first two rows belong to no token). The prefix is BLIP-2's: Li et al., arXiv 2301.12597, section
    3.3.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ranges import Range
from moe.slot import FeedForwardOutput
from moe.working import keep_exact
from omnivl.chain.chain import ChainLayer
from omnivl.chain.flops import num_rows, written
from omnivl.chain.positions import chosen_of
from omnivl.chain.state import State, StepLayout
from omnivl.data.tokenizer import TextInput
from omnivl.errors import ModelError
from omnivl.parts.bert import BertBlock
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.embed import WordTables
from omnivl.parts.linear import Linear, linear
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import Transformer

STACK = "language"
EMBED = "language_embed"
OFFSET = 2
"""Number of rows in the position table before the first position's; padded positions use the last of them."""
_PREFIX_KEPT = "cache/prefix/cross"
"""Field in which decoding keeps the prefix of each sample; later calls read its length."""


@dataclass(frozen=True)
class LanguageModel:
    """A decoder-only language model. The defaults are OPT-125M.

    Attributes:
        blocks: The transformer.
        vocab_size: Rows of the word embedding, which is the output head as well; that of its tokenizer if neither plan
            nor model file gives it.
        positions: Length of the longest row, prefix included.
        length: Token positions per text, start and end token included.
        tokenizer: Folder of a Hugging Face tokenizer, ``emoji`` or a ``vocab.txt``; null: the plan's.
    """

    blocks: Transformer = field(default_factory=lambda: Transformer(activation="relu", norm_eps=1e-5))
    vocab_size: Annotated[int, Range(1)] = 50272
    positions: Annotated[int, Range(1)] = 2048
    length: Annotated[int, Range(2)] = 32
    tokenizer: str | None = None

    @property
    def text_input(self) -> TextInput:
        """How the language model reads texts."""
        return TextInput(self.tokenizer, self.length, self.vocab_size)


def language_layers(language: LanguageModel, prefix: "Prefix", dtype: torch.dtype) -> Iterator[tuple[str, ChainLayer]]:
    """The layers with their names, each once; see ``language_order``.

    Args:
        language: Sizes.
        prefix: The layer that makes the prefix.
        dtype: The compute dtype.
    """
    yield "prefix", prefix
    yield EMBED, LanguageEmbed(language, dtype)
    for index in range(language.blocks.layers):
        yield f"{STACK}_{index:02d}", LanguageBlock(index, language, prefix.positions)


def language_order(names: Sequence[str]) -> list[str]:
    """The order of the forward pass: the embedding comes a second time after the last block, as the output head."""
    last = max(place for place, name in enumerate(names) if name.startswith(f"{STACK}_"))
    return [*names[: last + 1], EMBED, *names[last + 1 :]]


class Prefix(BlockLayer):
    """Queries to the prefix of the tokens: one map, ``prefix [B, P, D]``.

    Attributes:
        positions: P.
    """

    stack = "prefix"

    def __init__(self, query_size: int, num_queries: int, hidden_size: int, *, each: int = 1) -> None:
        """Builds the map.

        Args:
            query_size: Width of the queries.
            num_queries: Q.
            hidden_size: D.
            each: Positions that a query becomes.
        """
        super().__init__("prefix", lambda still: Linear(query_size, each * hidden_size))
        self.num_queries, self.positions = num_queries, each * num_queries

    def acts(self, layout: StepLayout) -> bool:
        """Whether a language row has a prefix."""
        return bool(layout.language) and "queries" in layout.fields

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the map."""
        assert isinstance(self.block, Linear)
        mapped = layout.batch_size * self.num_queries * self.acts(layout)
        return self.backward.passes * mapped * 2.0 * self.block.in_features * self.block.out_features

    def before(self, state: State) -> Tensor | None:
        """The queries, ``[B, Q, D_q]``; None where the state has none."""
        return state.get("queries")

    def forward(self, state: State) -> State:
        """Makes ``prefix``. When decoding with a cache, only the first call does."""
        queries = self.before(state)
        if not self.acts(state.layout) or _PREFIX_KEPT in state or queries is None:
            return state
        mapped: Tensor = self.run(queries)
        return state.updated(prefix=mapped.view(len(mapped), self.positions, -1))


class LanguageTables(WordTables):
    """Words and positions. The words are the output head as well."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__(language.vocab_size, language.positions + OFFSET, language.blocks.hidden_size)
        self.dropout = language.blocks.dropout

    def forward(self, prefix: Tensor | None, token_ids: Tensor, mask: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        """Embeds rows.

        Args:
            prefix: ``[R, P, D]``; None for tokens alone.
            token_ids: int64 ``[R, L]``.
            mask: bool ``[R, P + L]``, false where a token is padding.
            first: Number of positions before those of ``mask``.
            dtype: Dtype of the result if there is no prefix.

        Returns:
            ``[R, P + L, D]``.

        Raises:
            ModelError: The row is longer than the position table.
        """
        if first + mask.shape[1] + OFFSET > len(self.positions):
            raise ModelError(
                f"row of {first + mask.shape[1]} positions: the language model has {len(self.positions) - OFFSET}; "
                "raise model.language.positions or lower model.language.length"
            )
        words = self.embed(token_ids)
        words = words.to(dtype) if prefix is None else torch.cat([prefix, words.to(prefix.dtype)], dim=1)
        counted = (first + mask.cumsum(1)) * mask
        places = F.embedding(counted - 1 + OFFSET, self.positions)
        return F.dropout(words + places.to(words.dtype), self.dropout, self.training)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The rows of words, ``[R, L, D]``."""
        keep_exact(self.words)  # looked up and cast after that
        return F.embedding(token_ids, self.words)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., D]``."""
        return linear(hidden, self.words)


class LanguageEmbed(BlockLayer):
    """The first and the last layer of a language model: tokens to ``language``, hidden states to ``logits/...``.

    The first pass reads ``{segment}/token_ids`` and ``{segment}/mask`` (all true if missing) of each segment, and
    ``prefix``: row i of a segment follows row i of the prefix, in decoding row ``cache/rows[i]``. The second pass adds
    ``logits/{segment}`` fp32: ``[n, V]`` at ``chosen_of`` its targets where there are ``{segment}/targets``, else
    ``[R, V]`` of the last position. It drops the streams, and the ``pictures`` that they looked at.

    Attributes:
        dtype: The compute dtype.
    """

    stack = branch = STACK
    level = -1

    def __init__(
        self,
        language: LanguageModel,
        dtype: torch.dtype,
        tables: Callable[[LanguageModel], LanguageTables] = LanguageTables,
    ) -> None:
        """Builds the layer.

        Args:
            language: Sizes.
            dtype: The compute dtype.
            tables: Makes the tables.
        """
        super().__init__(EMBED, lambda still: tables(language))
        self.dtype, self.length = dtype, language.length

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are language rows."""
        return bool(layout.language)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the head."""
        assert isinstance(self.block, LanguageTables)
        positions = num_rows(layout.language) * written(self.length, tokens) * number
        words = self.block.words
        return self.backward.passes * positions * 2.0 * words.shape[0] * words.shape[1]

    def forward(self, state: State) -> State:
        """See the class."""
        if not self.acts(state.layout):
            return state
        return self._predict(state) if "language" in state else self._embed(state)

    def _embed(self, state: State) -> State:
        segments = state.layout.language
        token_ids = torch.cat([state[f"{name}/token_ids"] for name in segments])
        masks = [state.get(f"{name}/mask", state[f"{name}/token_ids"].new_ones(1, 1)) for name in segments]
        rows = [state[f"{name}/token_ids"].shape for name in segments]
        mask = torch.cat([one.bool().expand(shape) for one, shape in zip(masks, rows, strict=True)])
        prefix, first, kept = state.get("prefix"), 0, {}
        if "cache/rows" in state:
            first = int(state["cache/start"])
            if _PREFIX_KEPT in state:
                first += state[_PREFIX_KEPT].shape[1]
            elif prefix is not None:
                kept = {_PREFIX_KEPT: prefix}
                prefix = prefix.index_select(0, state["cache/rows"])
        elif prefix is not None and len(segments) > 1:
            prefix = torch.cat([prefix[: shape[0]] for shape in rows])
        if prefix is not None:
            mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        stream = self.run(prefix, token_ids, mask, first, self.dtype)
        return state.merged({"language": stream, "language_mask": mask, **kept}, drop=("prefix",))

    def _predict(self, state: State) -> State:
        assert isinstance(self.block, LanguageTables)
        layout, made = state.layout, dict[str, Tensor]()
        for name, rows in layout.language.items():
            hidden = state["language"][rows]
            if (targets := state.get(f"{name}/targets")) is not None:
                behind = hidden[:, hidden.shape[1] - targets.shape[1] :].flatten(0, 1)
                hidden = behind[chosen_of(state, name)]
            else:
                hidden = hidden[:, -1]
            made[f"logits/{name}"] = self.block.project(hidden).float()
        return state.merged(made, drop=("language", "language_mask", "pictures"))


class DecoderBlock(BertBlock):
    """A pre-norm block whose positions see themselves and earlier ones only."""

    def __init__(self, sizes: Transformer, index: int = 0) -> None:
        super().__init__(sizes, index, causal=True)

    def decode(self, x: Tensor, past: Tensor | None) -> tuple[FeedForwardOutput, Tensor]:
        """Advances the last positions ``x [R, l, D]`` of rows whose earlier keys and values are known.

        Args:
            x: The new positions.
            past: Keys and values of the earlier positions, ``[R, S - l, 2 D]``; None at the start.

        Returns:
            The block's output and the keys and values of all positions, ``[R, S, 2 D]``.
        """
        attended, past = self.attention.extend(self.enter(self.norm1, x), past)
        x = self.leave(self.norm1, x, attended)
        tokens = self.tokens(x, None, None, causal=True)
        out: FeedForwardOutput = recomputed(self.recomputes_ffn, self.ffn, self.enter(self.norm2, x), tokens)
        return FeedForwardOutput(self.norm_out(self.leave(self.norm2, x, out.y)), out.router_sums), past


class LanguageBlock(StackBlock):
    """A block of the language model; the last one ends with the normalisation of its output."""

    stack = branch = STACK

    def __init__(self, index: int, language: LanguageModel, prefix: int) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            language: Sizes.
            prefix: P of rows that have a prefix.
        """
        super().__init__(index, language.blocks, lambda own: DecoderBlock(own, index))
        self.length, self.prefix = language.length, prefix

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are language rows."""
        return bool(layout.language)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all rows."""
        assert isinstance(self.block, DecoderBlock)
        before = self.prefix if "queries" in layout.fields else 0
        row = self.block.flops(before + written(self.length, tokens), before + self.length, first_only=False)
        return self.backward.passes * num_rows(layout.language) * row

    def forward(self, state: State) -> State:
        """Advances ``language``; if decoding keeps a cache, stores keys and values in ``cache/{layer}/self``."""
        if not self.acts(state.layout):
            return state
        if "cache/rows" in state:
            assert isinstance(self.block, DecoderBlock)
            name = f"cache/{self.name}/self"
            out, past = self.block.decode(state["language"], state.get(name))
            return state.merged({"language": out.y, name: past})
        out = self.run(state["language"], state["language_mask"])
        return self.with_routing(state.updated(language=out.y), out.router_sums)

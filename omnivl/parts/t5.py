"""T5's encoder and decoder as layers, in the form of T5 v1.1 and mT5, with pictures before the words.

Shapes: R rows, S positions, L text positions, N image tokens, D hidden size, H heads, d size of a head, F inner size,
B buckets.

Blocks normalise by the root mean square alone, and have no biases. Scores are not scaled; the maps of queries start
smaller by the scale instead. Scores of self-attention have a learnt term by the distance of two positions, whose table
all blocks of a stack share: it is kept with the embeddings and travels with the state.

Source: Raffel et al., T5, arXiv 1910.10683, sections 2.1 and 3.1.1; Shazeer, arXiv 2002.05202 (gated GELU); Xue et al.,
    mT5, arXiv 2010.11934, section 3.2; numbers as in transformers' ``T5ForConditionalGeneration``.
Differs: dropout acts on branches and embeddings, not on attention and inner states. Starting values of matrices are the
    project's (``moe.linear``).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.backward import VISUAL
from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.decoder import seen_by_written
from omnivl.parts.linear import Linear, Role, draw_normal
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.towers import EmbedTowers, Towers

BUCKETS = 32
"""B: buckets of distances."""
FARTHEST = 128
"""Distances from here on share a bucket."""
ENCODER_TABLE, DECODER_TABLE = "distances/encoder", "distances/decoder"
"""Fields of the state with the tables of both stacks, fp32 ``[B, H]``."""


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, and a learnt scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., D]`` in fp32; the result has the input's dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def buckets(distance: Tensor, *, both_ways: bool) -> Tensor:
    """The bucket of each distance, int64: key position minus query position.

    Half of the buckets are for one distance each, the others are wider by the logarithm, up to ``FARTHEST``. If
    positions see ``both_ways``, earlier and later keys have half of the buckets each.

    Source: arXiv 1910.10683, section 2.1; as in its released code.
    """
    count = BUCKETS // 2 if both_ways else BUCKETS
    first = (distance > 0).long() * count if both_ways else torch.zeros_like(distance)
    far = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = count // 2
    wide = (far.clamp(min=1).float() / exact).log() / math.log(FARTHEST / exact) * (count - exact)
    return first + torch.where(far < exact, far, (exact + wide.long()).clamp(max=count - 1))


def distance_scores(table: Tensor, queries: Tensor, keys: Tensor, *, both_ways: bool) -> Tensor:
    """What a table ``[B, H]`` adds to scores, ``[1, H, Q, K]``, by positions ``queries [Q]`` and ``keys [K]``."""
    found = F.embedding(buckets(keys[None] - queries[:, None], both_ways=both_ways), table)
    return found.permute(2, 0, 1)[None]


def unscaled_attention(q: Tensor, kv: Tensor, num_heads: int, allowed: Tensor | None, scores: Tensor | None) -> Tensor:
    """Attention whose scores are plain products.

    Args:
        q: Queries ``[R, Q, H d]``.
        kv: Keys and values side by side, ``[R, K, 2 H d]``.
        num_heads: H.
        allowed: Which keys each query may attend to, bool, broadcast to ``[R, H, Q, K]``; None: all.
        scores: Added to the scores, broadcast likewise, with gradient; None: nothing.

    Returns:
        ``[R, Q, H d]``.
    """
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))
    added = allowed
    if scores is not None:
        added = scores.to(q.dtype)
        if allowed is not None:
            added = added.masked_fill(~allowed, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0).transpose(1, 2).flatten(2)


class T5Attention(nn.Module):
    """The maps around ``unscaled_attention``."""

    def __init__(self, sizes: Transformer, head_size: int) -> None:
        """Builds the maps of a stack's block."""
        super().__init__()
        inner = sizes.num_heads * head_size
        self.num_heads, self.recompute = sizes.num_heads, sizes.recompute == "attention"
        self.q = Linear(sizes.hidden_size, inner, bias=False)
        self.kv = Linear(sizes.hidden_size, 2 * inner, bias=False, matrices=2)
        self.out = Linear(inner, sizes.hidden_size, bias=False)
        with torch.no_grad():
            self.q.weight.mul_(head_size**-0.5)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield from (("attention", one) for one in (self.q, self.kv, self.out))

    def flops(self, positions: float, seen: float) -> float:
        """Operations on one row of ``positions`` that look at ``seen``, forward, without keys and values."""
        return 4.0 * positions * self.q.out_features * (self.q.in_features + seen)

    def project_flops(self, seen: float) -> float:
        """Operations of keys and values of one row, forward."""
        return 2.0 * seen * self.kv.in_features * self.kv.out_features

    def forward(self, x: Tensor, kv: Tensor, allowed: Tensor | None, scores: Tensor | None) -> Tensor:
        """Attends from ``x [R, Q, D]`` to keys and values; the rest as in ``unscaled_attention``."""
        inputs = self.q(x), kv, self.num_heads, allowed, scores
        out: Tensor = self.out(recomputed(self.recompute, unscaled_attention, *inputs))
        return out


class GatedFeedForward(nn.Module):
    """``fc2(gelu(gate x) * (fc1 x))`` without biases; GELU by tanh, as in the released weights.

    Source: Shazeer, arXiv 2002.05202, equation 6.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, 2 * inner_size, bias=False, matrices=2)
        self.fc2 = Linear(inner_size, hidden_size, bias=False)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield from (("feed_forward", self.fc1), ("feed_forward", self.fc2))

    def flops(self) -> float:
        """Operations on one position, forward."""
        return 6.0 * self.fc2.in_features * self.fc2.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., D]`` to the same shape."""
        gate, inner = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.gelu(gate, approximate="tanh") * inner)
        return out


class T5Block(nn.Module):
    """What blocks of both stacks share."""

    def __init__(self, sizes: Transformer, head_size: int) -> None:
        """Builds self-attention and the feed-forward layer."""
        super().__init__()
        self.dropout, self.recomputes_ffn = sizes.dropout, sizes.recompute == "ffn"
        self.attention = T5Attention(sizes, head_size)
        self.norm1 = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.ffn = GatedFeedForward(sizes.hidden_size, sizes.inner_size)
        self.norm_ffn = RMSNorm(sizes.hidden_size, sizes.norm_eps)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream with a branch's output."""
        return x + F.dropout(branch, self.dropout, self.training)

    def feed(self, x: Tensor) -> Tensor:
        """The stream behind the feed-forward layer."""
        return self.add(x, recomputed(self.recomputes_ffn, self.ffn, self.norm_ffn(x)))


class T5EncoderBlock(T5Block):
    """A block over image tokens and words."""

    def __init__(self, sizes: Transformer, head_size: int, seen: int) -> None:
        """Builds the block; ``seen`` is N."""
        super().__init__(sizes, head_size)
        self.seen = seen

    def flops(self, positions: float) -> float:
        """Operations on one row, forward."""
        attention = self.attention.flops(positions, positions) + self.attention.project_flops(positions)
        return attention + positions * self.ffn.flops()

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        """Advances ``x [R, L + N, D]``, in which image tokens stand behind the words but count as before them.

        Args:
            x: The rows.
            mask: bool ``[R, L + N]``, true where there is a token.
            table: Of the stack, ``[B, H]``.
        """
        places = torch.arange(x.shape[1], device=x.device).roll(x.shape[1] - self.seen)
        scores, read = distance_scores(table, places, places, both_ways=True), self.norm1(x)
        x = self.add(x, self.attention(read, self.attention.kv(read), mask[:, None, None], scores))
        return self.feed(x)


class T5DecoderBlock(T5Block):
    """A causal block that also attends to the encoder's rows; the last one normalises what leaves it."""

    def __init__(self, sizes: Transformer, head_size: int, index: int) -> None:
        """Builds block ``index``."""
        super().__init__(sizes, head_size)
        self.cross = T5Attention(sizes, head_size)
        self.norm2 = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        is_last = index == sizes.layers - 1
        self.norm_out = RMSNorm(sizes.hidden_size, sizes.norm_eps) if is_last else nn.Identity()

    def flops(self, positions: float, seen: float) -> float:
        """Operations on one text, forward, without keys and values of the encoder's rows."""
        own = self.attention.flops(positions, positions) + self.attention.project_flops(positions)
        return own + self.cross.flops(positions, seen) + positions * self.ffn.flops()

    def forward(
        self, x: Tensor, memory: Tensor, rows: Tensor | None, memory_mask: Tensor | None, table: Tensor
    ) -> Tensor:
        """Advances ``x [R, L, D]``, whose padding is at the end, where no token looks.

        Args:
            x: The texts.
            memory: The encoder's rows, ``[R_memory, S, D]``.
            rows: int64 ``[R]``, the row of memory of each text; None: they correspond one to one.
            memory_mask: bool ``[R_memory, S]``; None: no padding.
            table: Of the stack, ``[B, H]``.
        """
        out, _ = self.extend(x, None, self.cross.kv(memory), rows, memory_mask, table)
        return out

    def extend(
        self,
        x: Tensor,
        past: Tensor | None,
        kv: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None,
        table: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Advances the last positions of texts.

        Args:
            x: The new positions, ``[R, l, D]``.
            past: Keys and values of the earlier positions, ``[R, L - l, 2 H d]``; None at the start.
            kv: Keys and values of the encoder's rows.
            rows: As in ``forward``.
            memory_mask: As in ``forward``.
            table: As in ``forward``.

        Returns:
            The new positions, and keys and values of all, ``[R, L, 2 H d]``.
        """
        read = self.norm1(x)
        own: Tensor = self.attention.kv(read)
        own = own if past is None else torch.cat([past, own], dim=1)
        keys = torch.arange(own.shape[1], device=x.device)
        queries = keys[own.shape[1] - x.shape[1] :]
        scores = distance_scores(table, queries, keys, both_ways=False)
        x = self.add(x, self.attention(read, own, keys <= queries[:, None], scores))
        if rows is not None:
            kv = kv.index_select(0, rows)
            memory_mask = None if memory_mask is None else memory_mask.index_select(0, rows)
        allowed = None if memory_mask is None else memory_mask[:, None, None]
        x = self.add(x, self.cross(self.norm2(x), kv, allowed, None))
        out: Tensor = self.norm_out(self.feed(x))
        return out, own


class T5Words(nn.Module):
    """The words, which both stacks share, and the tables of distances."""

    def __init__(self, words: Words, encoder: Transformer, decoder: Transformer) -> None:
        super().__init__()
        self.dropout = encoder.dropout
        self.words = nn.Parameter(torch.empty(words.vocab_size, encoder.hidden_size))
        self.encoder_table = nn.Parameter(torch.empty(BUCKETS, encoder.num_heads))
        self.decoder_table = nn.Parameter(torch.empty(BUCKETS, decoder.num_heads))
        draw_normal(self.words, std=1.0)
        for table in (self.encoder_table, self.decoder_table):
            draw_normal(table, std=encoder.hidden_size**-0.5)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """All of them."""
        yield from (self.words, self.encoder_table, self.decoder_table)

    def forward(self, token_ids: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """Embeds ``[R, L]`` to ``[R, L, D]`` of ``dtype``; positions, from ``start`` on, add nothing here."""
        return F.dropout(F.embedding(token_ids, self.words).to(dtype), self.dropout, self.training)


class EmbedT5(EmbedTowers):
    """Pixels and token ids to the start of each stream, and the tables of distances to the state."""

    def __init__(
        self,
        patches: Patches,
        vision: Transformer,
        words: Words,
        stacks: tuple[Transformer, Transformer],
        reads: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Builds the embeddings; ``stacks`` are encoder and decoder, the rest as in ``EmbedTowers``."""
        encoder, decoder = stacks
        super().__init__(
            patches, vision, words, encoder, reads, dtype, embed_texts=lambda own, text: T5Words(own, text, decoder)
        )

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The table of a stack that no step uses too."""
        yield from super().idle_parameters(layouts)
        text = self._tables
        if any(layout.text or layout.generation for layout in layouts):
            if not any(layout.fused for layout in layouts):
                yield text.encoder_table
            if not any(layout.generation for layout in layouts):
                yield text.decoder_table

    def forward(self, state: State) -> State:
        """See the class.

        Raises:
            ModelError: An objective masks images, or writes without an encoder's rows.
        """
        layout = state.layout
        if layout.generation and not layout.written_from and "memory" not in state:
            raise ModelError(
                f"architecture 'pali': got {next(iter(layout.generation))!r}, whose decoder looks at images; "
                "allowed are texts whose decoder looks at a text beside an image, as of 'split_lm' and 'answer'; "
                "change the objective or model.kind"
            )
        state, tables = super().forward(state), self._tables
        # Copies: where parameters are gathered on use these are gone when later layers read them.
        made = {ENCODER_TABLE: tables.encoder_table.clone()} if layout.fused else {}
        made |= {DECODER_TABLE: tables.decoder_table.clone()} if layout.generation else {}
        return state.merged(made)

    @property
    def _tables(self) -> T5Words:
        assert isinstance(self.block, Towers)
        assert isinstance(self.block.text, T5Words)
        return self.block.text


class MapPatches(BlockLayer):
    """The end of the image encoder: every patch mapped to the width of the words; class tokens are left out."""

    stack = branch = VISUAL

    def __init__(self, vision: Transformer, size: int, patches: Patches) -> None:
        """Builds the map of ``vision`` to the width ``size``."""
        super().__init__("visual_map", lambda still: Linear(vision.hidden_size, size))
        rows, columns = patches.grid(is_video=False)
        self.seen = rows * columns

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the map."""
        assert isinstance(self.block, Linear)
        positions = num_rows(layout.visual) * self.seen
        return self.backward.passes * positions * 2.0 * self.block.in_features * self.block.out_features

    def forward(self, state: State) -> State:
        """Maps ``visual``, ``[M, 1 + N, D_v]`` to ``[M, N, D]``."""
        if not self.acts(state.layout):
            return state
        return state.updated(visual=self.run(state["visual"][:, 1:]))


class T5EncoderLayer(StackBlock):
    """A block of the encoder on the fused rows."""

    stack = "fused"

    def __init__(self, index: int, sizes: Transformer, head_size: int, length: int, seen: int) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the encoder.
            head_size: d.
            length: L.
            seen: N.
        """
        super().__init__(index, sizes, lambda own: T5EncoderBlock(own, head_size, seen))
        self.length, self.seen = length, seen

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of the fused rows, padding included."""
        assert isinstance(self.block, T5EncoderBlock)
        return self.backward.passes * num_rows(layout.fused) * self.block.flops(self.length + self.seen)

    def forward(self, state: State) -> State:
        """Advances ``fused``."""
        if not self.acts(state.layout):
            return state
        return state.updated(fused=self.run(state["fused"], state["fused_mask"], state[ENCODER_TABLE]))


class T5EncoderNorm(BlockLayer):
    """The normalisation at the end of the encoder; ``fused`` keeps words and image tokens."""

    stack = "fused"

    def __init__(self, sizes: Transformer) -> None:
        super().__init__("fused_norm", lambda still: RMSNorm(sizes.hidden_size, sizes.norm_eps))

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def forward(self, state: State) -> State:
        """Normalises ``fused``."""
        if not self.acts(state.layout):
            return state
        return state.updated(fused=self.run(state["fused"]), drop=("memory", "fused_memory", ENCODER_TABLE))


class T5DecoderLayer(StackBlock):
    """A block of the decoder on the generation stream; rows of memory and the cache as in ``GenerationBlock``."""

    stack = "generation"

    def __init__(self, index: int, sizes: Transformer, head_size: int, length: int, seen: int) -> None:
        """Builds block ``index``; arguments as those of ``T5EncoderLayer``."""
        super().__init__(index, sizes, lambda own: T5DecoderBlock(own, head_size, index))
        self.length, self.seen = length, seen

    def acts(self, layout: StepLayout) -> bool:
        """Whether the generation stream runs."""
        return bool(layout.generation)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of the generation stream, padding included."""
        assert isinstance(self.block, T5DecoderBlock)
        seen = self.length + self.seen
        fused = num_rows({name: layout.fused[name] for name in layout.written_from})
        total = fused * self.block.cross.project_flops(seen)
        for name, rows in layout.generation.items():
            length = layout.joins[name].length
            own = self.length if length is None else length
            total += num_rows({name: rows}) * self.block.flops(own, seen)
        return self.backward.passes * total

    def forward(self, state: State) -> State:
        """Advances ``generation``."""
        if not self.acts(state.layout):
            return state
        if "cache/rows" in state:
            return self._decode(state)
        memory, mask = seen_by_written(state)
        seen = memory, state.get("generation_memory"), mask, state[DECODER_TABLE]
        return state.updated(generation=self.run(state["generation"], *seen))

    def _decode(self, state: State) -> State:
        assert isinstance(self.block, T5DecoderBlock)
        past_name, cross_name = f"cache/{self.name}/self", f"cache/{self.name}/cross"
        kv = state[cross_name] if cross_name in state else self.block.cross.kv(state["memory"])
        seen = kv, state["cache/rows"], state.get("memory_mask"), state[DECODER_TABLE]
        out, past = self.block.extend(state["generation"], state.get(past_name), *seen)
        return state.merged({"generation": out, past_name: past, cross_name: kv})

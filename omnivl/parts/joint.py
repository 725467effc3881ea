"""A decoder over images and words in one sequence: image positions see each other, words see them and earlier words.

Shapes: R rows of text, M images or clips, T frames, S positions of an image or clip, L text positions, D hidden size,
D_v width of the image encoder.

No image position sees a word, so that an image passes the decoder once, however many texts are written about it: each
block advances the images apart from the words, with the same weights.

Source: Wang et al., GIT, arXiv 2205.14100, section 3.1 and figure 2 (seq2seq attention mask); numbers as in its
    released code.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe.feed_forward import build_feed_forward
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Tokens
from omnivl.chain.backward import VISUAL
from omnivl.chain.flops import num_rows, written
from omnivl.chain.positions import kept_name
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import SelfAttention, cross_attention, self_attention
from omnivl.parts.bert import TEXT_MODALITY, ResidualBlock
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.embed import resize_times
from omnivl.parts.linear import LayerNorm, Linear
from omnivl.parts.padding import Padding
from omnivl.parts.patches import num_patches
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MODALITIES, Patches, Transformer

IMAGE_MODALITY = "image"


class VisualMap(nn.Module):
    """A map to the decoder's width, normalised; of clips each frame has a learnt embedding, which starts from zero."""

    def __init__(self, width: int, size: int, frames: int, eps: float) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.zeros(frames, width)) if frames > 1 else None
        self.linear, self.norm = Linear(width, size), LayerNorm(size, eps)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The frames' embeddings."""
        if self.times is not None:
            yield self.times

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes the frames' embeddings to another number of frames."""
        return resize_times(before, len(own)) if name == "times" else None

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps ``[M, S, D_v]``, frame by frame, to ``[M, S, D]``."""
        if frames > 1 and self.times is not None:
            times = resize_times(self.times, frames).to(x.dtype)
            x = (x.reshape(len(x), frames, -1, x.shape[-1]) + times[:, None]).flatten(1, 2)
        mapped: Tensor = self.norm(self.linear(x))
        return mapped


class MapVisual(BlockLayer):
    """The end of the image encoder: ``visual`` as the decoder reads it."""

    stack = branch = VISUAL

    def __init__(self, vision: Transformer, size: int, patches: Patches) -> None:
        """Builds the map of ``vision`` to the decoder's width ``size``."""
        width, eps = vision.hidden_size, vision.norm_eps
        super().__init__("visual_map", lambda still: VisualMap(width, size, patches.num_frames, eps))
        self.patches = patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Without clips the frames' embeddings too."""
        yield from super().idle_parameters(layouts)
        active = [layout for layout in layouts if self.acts(layout)]
        if active and all(layout.num_frames == 1 for layout in active):
            assert isinstance(self.block, VisualMap)
            yield from self.block.undecayed()

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the map."""
        assert isinstance(self.block, VisualMap)
        linear = self.block.linear
        positions = num_rows(layout.visual) * positions_of(self.patches, layout)
        return self.backward.passes * positions * 2.0 * linear.in_features * linear.out_features

    def forward(self, state: State) -> State:
        """Maps ``visual``."""
        if not self.acts(state.layout):
            return state
        return state.updated(visual=self.run(state["visual"], state.layout.num_frames))


def positions_of(patches: Patches, layout: StepLayout) -> float:
    """S: each frame has a class token and its patches."""
    return layout.num_frames * (1 + num_patches(patches, layout))


class JointBlock(ResidualBlock):
    """One block over images and words, without the chain around it."""

    def __init__(self, sizes: Transformer, index: int) -> None:
        """Builds block ``index`` of a stack."""
        super().__init__(sizes, index)
        size, self.causal = sizes.hidden_size, True
        slot = Slot(index, (IMAGE_MODALITY, TEXT_MODALITY), MODALITIES, depth=sizes.layers, activation=sizes.activation)
        self.attention = SelfAttention(size, sizes.num_heads, sizes.recompute == "attention")
        self.norm1 = LayerNorm(size, sizes.norm_eps)
        self.ffn = build_feed_forward(sizes.ffn, size, sizes.inner_size, slot)
        self.norm2 = LayerNorm(size, sizes.norm_eps)

    def flops_of_images(self, positions: float, goes_on: bool) -> float:
        """Operations on one image, forward; without ``goes_on`` only its keys and values are read."""
        if not goes_on:
            return positions * 4.0 * self.attention.qkv.in_features**2
        return self.attention.flops(positions, positions) + positions * self.slot_flops

    def flops_of_words(self, tokens: float, length: float, seen: float) -> float:
        """Operations on one text of ``tokens`` tokens in ``length`` positions that see ``seen`` ones, forward."""
        size = self.attention.qkv.in_features
        return tokens * (8.0 * size**2 + self.slot_flops) + 4.0 * length * (seen + length) * size

    def forward(
        self,
        words: Tensor,
        mask: Tensor,
        memory: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None,
        kept: Tensor | None,
        goes_on: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Advances words and images.

        Args:
            words: ``[R, L, D]``.
            mask: bool ``[R, L]``, true where there is a token.
            memory: Images, ``[M, S, D]``.
            rows: int64 ``[R]``, the image of each text; None when they correspond one to one.
            memory_mask: bool ``[M, S]``, which of their positions are no padding; None: all.
            kept: int64 ``[n]``, the text positions to compute where they are known.
            goes_on: Whether a later block reads the images.

        Returns:
            The words, and the images where they go on.
        """
        memory_after, kv = self.see(memory, memory_mask, goes_on)
        padding = Padding.worth_dropping(mask, kept)
        words = words if padding is None else padding.drop(words)
        qkv: Tensor = self.attention.qkv(self.enter(self.norm1, words))
        after, _ = self._write(words, qkv if padding is None else padding.restore(qkv), kv, rows, memory_mask, padding)
        return after if padding is None else padding.restore(after), memory_after

    def see(self, memory: Tensor, mask: Tensor | None, goes_on: bool) -> tuple[Tensor | None, Tensor]:
        """Images after the block, None where no later one reads them, and their keys and values, ``[M, S, 2 D]``."""
        attention, read = self.attention, self.enter(self.norm1, memory)
        if not goes_on:
            return None, attention.qkv.part(read, 1, 3)
        qkv: Tensor = attention.qkv(read)
        attended = recomputed(attention.recompute, self_attention, qkv, attention.num_heads, mask)
        x = self.leave(self.norm1, memory, attention.out(attended))
        out: FeedForwardOutput = recomputed(
            self.recomputes_ffn, self.ffn, self.enter(self.norm2, x), Tokens.of(IMAGE_MODALITY, x)
        )
        return self.leave(self.norm2, x, out.y), qkv[..., memory.shape[-1] :]

    def decode(
        self, words: Tensor, past: Tensor | None, kv: Tensor, rows: Tensor, memory_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Advances the last words ``[R, l, D]`` of texts whose earlier keys and values are known.

        Args:
            words: The new positions.
            past: Keys and values of the earlier ones, ``[R, L - l, 2 D]``; None at the start.
            kv: Of the images, from ``see``.
            rows: As in ``forward``.
            memory_mask: As in ``forward``.

        Returns:
            The words, and the keys and values of all of them, ``[R, L, 2 D]``.
        """
        qkv: Tensor = self.attention.qkv(self.enter(self.norm1, words))
        return self._write(words, qkv, kv, rows, memory_mask, None, past)

    def _write(
        self,
        words: Tensor,
        qkv: Tensor,
        kv: Tensor,
        rows: Tensor | None,
        memory_mask: Tensor | None,
        padding: Padding | None,
        past: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The words after the block, and keys and values of all words; see ``forward`` and ``decode``.

        ``qkv [R, l, 3 D]`` are in rows, while padding is left out of ``words``.
        """
        attention, size = self.attention, words.shape[-1]
        q, own = qkv[..., :size], qkv[..., size:]
        own = own if past is None else torch.cat([past, own], dim=1)
        seen = kv if rows is None else kv.index_select(0, rows)
        mask = memory_mask if memory_mask is None or rows is None else memory_mask.index_select(0, rows)
        if mask is not None:  # padding of texts is at their ends, where no token looks
            mask = torch.cat([mask, mask.new_ones(own.shape[:2])], dim=1)
        every = torch.cat([seen, own], dim=1)
        attended = recomputed(attention.recompute, cross_attention, q, every, attention.num_heads, mask, True)
        x = self.leave(self.norm1, words, attention.out(attended if padding is None else padding.drop(attended)))
        out: FeedForwardOutput = recomputed(
            self.recomputes_ffn, self.ffn, self.enter(self.norm2, x), Tokens.of(TEXT_MODALITY, x)
        )
        return self.norm_out(self.leave(self.norm2, x, out.y)), own


class JointLayer(StackBlock):
    """A block of the decoder on ``memory`` and ``generation``.

    Row b of the latter sees row b of the former, or row ``generation_memory[b]``. If decoding keeps a cache, row b sees
    row ``cache/rows[b]``, and the block stores keys and values of words in ``cache/{layer}/self``, those of images in
    ``cache/{layer}/cross``.
    """

    stack = "generation"

    def __init__(self, index: int, sizes: Transformer, length: int, patches: Patches) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the decoder.
            length: L.
            patches: Sizes of pictures and patches.
        """
        super().__init__(index, sizes, lambda own: JointBlock(own, index))
        self.length, self.patches, self.goes_on = length, patches, index < sizes.layers - 1

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are texts to write."""
        return bool(layout.generation)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of images and texts."""
        assert isinstance(self.block, JointBlock)
        if not self.acts(layout):
            return 0.0
        seen = positions_of(self.patches, layout)
        total = layout.batch_size * self.block.flops_of_images(seen, self.goes_on)
        for name, rows in layout.generation.items():
            length = layout.joins[name].length
            own = written(self.length, tokens, length), self.length if length is None else length
            total += num_rows({name: rows}) * self.block.flops_of_words(*own, seen)
        return self.backward.passes * total

    def forward(self, state: State) -> State:
        """Advances ``generation`` and, but for the last block, ``memory``."""
        if not self.acts(state.layout):
            return state
        if "cache/rows" in state:
            return self._decoded(state)
        rows, own = state.get("generation_memory"), state.layout.batch_size
        memory, mask = state["memory"], state.get("memory_mask")
        if rows is None and len(memory) > own:  # rows of other segments may follow
            memory, mask = memory[:own], None if mask is None else mask[:own]
        kept = state.get(kept_name("generation"))
        given = state["generation"], state["generation_mask"], memory, rows, mask, kept, self.goes_on
        words, memory = self.run(*given)
        made = {"generation": words} | ({} if memory is None else {"memory": memory})
        return state.merged(made, drop=() if self.goes_on else ("memory", "memory_mask", "generation_memory"))

    def _decoded(self, state: State) -> State:
        block, past_name, cross_name = self.block, f"cache/{self.name}/self", f"cache/{self.name}/cross"
        assert isinstance(block, JointBlock)
        mask, made = state.get("memory_mask"), dict[str, Tensor]()
        if cross_name in state:
            kv = state[cross_name]
        else:
            memory, kv = block.see(state["memory"], mask, self.goes_on)
            made |= {} if memory is None else {"memory": memory}
        words, past = block.decode(state["generation"], state.get(past_name), kv, state["cache/rows"], mask)
        return state.merged({**made, "generation": words, past_name: past, cross_name: kv})

"""An encoder over words and image tokens for a decoder that goes on with the text: the layers around it.

Shapes: B samples, N image tokens, L text positions, R rows, D hidden size.

Source: Wang et al., SimVLM, arXiv 2108.10904, section 3.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from omnivl.chain.demands import CLEAN
from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.parts.block import BlockLayer, EmbeddingLayer
from omnivl.parts.conv_stem import ConvEmbedding
from omnivl.parts.embed import TextEmbedding
from omnivl.parts.linear import LayerNorm
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.towers import words_of
from omnivl.parts.unified import UnifiedBlock
from omnivl.parts.vilt import FusedLayer


class PrefixEmbeddings(nn.Module):
    """Embeddings of images and of words; encoder and decoder share those of words."""

    def __init__(self, patches: Patches, width: int, depths: Sequence[int], words: Words, encoder: Transformer) -> None:
        super().__init__()
        self.visual = ConvEmbedding(width, depths, patches.grid(is_video=False), encoder.hidden_size)
        self.text = TextEmbedding(words, encoder)


class EmbedPrefix(EmbeddingLayer):
    """Images and token ids to ``visual_input``, ``text_input`` and ``text_mask``, which fused rows are made of.

    Texts that are written start as ``generation``; in decoding with a cache at position ``cache/start``.
    """

    def __init__(
        self,
        patches: Patches,
        width: int,
        depths: Sequence[int],
        words: Words,
        encoder: Transformer,
        pad: int,
        dtype: torch.dtype,
    ) -> None:
        """Builds the embeddings.

        Args:
            patches: Sizes of images; a patch is what becomes a token.
            width: See ``ConvEmbedding``.
            depths: Likewise.
            words: Of the texts.
            encoder: The stack that reads them.
            pad: The padding token's id.
            dtype: The compute dtype.
        """
        super().__init__(lambda still: PrefixEmbeddings(patches, width, depths, words, encoder), dtype)
        self.sizes, self.pad = patches, pad

    def acts(self, layout: StepLayout) -> bool:
        """Whether rows are joined or written."""
        return bool(layout.fused or layout.generation)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the convolutions. No gradient flows into pixels: one product less of the first."""
        assert isinstance(self.block, PrefixEmbeddings)
        visual, side, images = self.block.visual, self.sizes.image_size, num_rows(layout.visual)
        stem, trained = visual.stem.flops(side), self.backward.pixels
        passes = self.backward.passes_on_pixels + (trained > 0)  # of what follows the first convolution
        return images * (passes * (visual.flops(side) - stem) + self.backward.passes_on_pixels * stem)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The embedding of images where no step has any."""
        assert isinstance(self.block, PrefixEmbeddings)
        if not any(self.acts(layout) for layout in layouts):
            yield from self.block.text.parameters()
        if not any(layout.fused for layout in layouts):
            yield from self.block.visual.parameters()

    def forward(self, state: State) -> State:
        """See the class.

        Raises:
            ModelError: An objective masks images, or writes without an encoder's rows; or see ``ConvEmbedding``.
        """
        layout, online, made = state.layout, self.block, dict[str, Tensor]()
        assert isinstance(online, PrefixEmbeddings)
        if not self.acts(layout):
            return state
        if masked := sorted(layout.visual.keys() - {CLEAN}):
            raise ModelError(
                f"architecture 'simvlm': got the masked images {masked[0]!r}; allowed are whole ones; take the "
                "objective out or change model.kind"
            )
        if layout.generation and not layout.written_from and "memory" not in state:
            raise ModelError(
                f"architecture 'simvlm': got {next(iter(layout.generation))!r}, whose decoder looks at images; "
                "allowed are texts whose decoder looks at a text beside an image, as of 'split_lm'; change "
                "the objective or model.kind"
            )
        if layout.fused:
            token_ids = words_of(state, layout.text)
            made |= {"visual_input": online.visual(state["frames"], self.dtype)}
            made |= {"text_input": online.text(token_ids, self.dtype), "text_mask": token_ids != self.pad}
        if layout.generation:
            token_ids = words_of(state, [layout.joins[name].text for name in layout.generation])
            start = int(state["cache/start"]) if "cache/start" in state else 0
            made |= {"generation": online.text(token_ids, self.dtype, start), "generation_mask": token_ids != self.pad}
        return state.merged(made)


class PrefixLayer(FusedLayer):
    """A pre-norm block over words and image tokens, which have no class token."""

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the fused rows."""
        assert isinstance(self.block, UnifiedBlock)
        rows, columns = self.patches.grid(is_video=False)
        words, seen = self.length if tokens is None else tokens, rows * columns
        row = self.block.flops(words + seen, self.length + seen)
        return self.backward.passes * num_rows(layout.fused) * row


class PrefixNorm(BlockLayer):
    """The normalisation at the end of the encoder; ``fused`` keeps words and image tokens."""

    stack = "fused"

    def __init__(self, sizes: Transformer) -> None:
        super().__init__("fused_norm", lambda still: LayerNorm(sizes.hidden_size, sizes.norm_eps))

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def forward(self, state: State) -> State:
        """Normalises ``fused``."""
        if not self.acts(state.layout):
            return state
        return state.updated(fused=self.run(state["fused"]), drop=("memory", "fused_memory"))

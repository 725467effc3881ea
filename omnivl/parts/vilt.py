"""One transformer over words and patches, concatenated from their embeddings on.

Shapes: B samples, H x W pixels, C = 3 * patch * patch values of a patch, N patches of an image, L text positions,
S = L + 1 + N positions of a row, R fused rows, D hidden size.

Source: Kim et al., ViLT, arXiv 2102.03334, section 3; numbers as in its released code (pre-norm blocks of ViT, GELU).
Differs: images of a step have one size unless ``sizes`` is ``native``, and no patch is left out at random.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import CLEAN
from omnivl.chain.flops import num_rows
from omnivl.chain.positions import ids_name
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.parts.bert import TEXT_EPS
from omnivl.parts.block import BlockLayer, EmbeddingLayer, StackBlock
from omnivl.parts.embed import TextEmbedding
from omnivl.parts.linear import LayerNorm, Linear, draw_normal
from omnivl.parts.patches import num_patches, visual_positions
from omnivl.parts.plain_vit import ImageEmbedding
from omnivl.parts.ragged import visual_mask
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.unified import UnifiedBlock, joined_stream

TEXT, IMAGE = 0, 1
"""Rows of the table of modalities."""


class TypedTextEmbedding(TextEmbedding):
    """Word, position and token type, normalised, as in BERT; a text is of type 0."""

    def __init__(self, words: Words, hidden_size: int, dropout: float) -> None:
        super().__init__(words, Transformer(hidden_size=hidden_size, norm_eps=TEXT_EPS, dropout=dropout))
        self.types = nn.Parameter(torch.empty(2, hidden_size))
        draw_normal(self.types, std=0.02)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The tables."""
        yield from (*super().undecayed(), self.types)

    def places(self) -> Tensor:
        """Positions and the type, ``[length, D]``."""
        return self.positions + self.types[0]


class OneImageEmbedding(ImageEmbedding):
    """Patches, class token and positions of samples with one image each."""

    interpolation: ClassVar[Literal["bicubic", "bilinear"]] = "bilinear"

    def __init__(self, patches: Patches, blocks: Transformer) -> None:
        super().__init__(patches, blocks)
        self.dropout = blocks.dropout

    def forward(
        self,
        frames: Tensor,
        dtype: torch.dtype,
        grids: Tensor | None = None,
        masked: Sequence[tuple[Tensor, Tensor]] = (),
        clean: bool = True,
    ) -> Tensor:
        """Embeds uint8 ``frames [B, 1, 3, H, W]`` to ``[B, 1 + N, D]`` of ``dtype``; see ``ImageEmbedding``.

        Raises:
            ModelError: There are several frames or pictures in a sample, or their size is no multiple of a patch's.
        """
        assert clean and not masked, "EmbedPair refuses masked images"
        if frames.shape[1] != 1:
            raise ModelError(
                f"architecture 'vilt': got samples of {frames.shape[1]} frames or pictures; allowed is one image; "
                "change the kind of the data entry to 'image_text', or model.kind"
            )
        return F.dropout(super().forward(frames, dtype, grids), self.dropout, self.training)


class PairEmbeddings(nn.Module):
    """Embeddings of both modalities, and the modality embeddings."""

    def __init__(self, patches: Patches, words: Words, blocks: Transformer) -> None:
        super().__init__()
        self.visual = OneImageEmbedding(patches, blocks)
        self.text = TypedTextEmbedding(words, blocks.hidden_size, blocks.dropout)
        self.modalities = nn.Parameter(torch.empty(2, blocks.hidden_size))
        nn.init.trunc_normal_(self.modalities, std=0.02, a=-0.04, b=0.04)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The table of modalities."""
        yield self.modalities


class EmbedPair(EmbeddingLayer):
    """Images and token ids to ``visual_input``, ``text_input`` and ``text_mask``, which fused rows are made of.

    Text segments other than the clean one read ``{name}/token_ids``.
    """

    def __init__(self, patches: Patches, words: Words, blocks: Transformer, pad: int, dtype: torch.dtype) -> None:
        """Builds the embeddings.

        Args:
            patches: Sizes of images and patches.
            words: Of the texts.
            blocks: The stack that reads them.
            pad: The padding token's id.
            dtype: The compute dtype.
        """
        super().__init__(lambda still: PairEmbeddings(patches, words, blocks), dtype)
        self.sizes, self.pad = patches, pad

    def acts(self, layout: StepLayout) -> bool:
        """Whether rows are joined."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the patches. No gradient flows into pixels: one product less."""
        assert isinstance(self.block, PairEmbeddings)
        image = self.block.visual.flops(1, num_patches(self.sizes, layout))
        return self.backward.passes_on_pixels * num_rows(layout.visual) * image

    def forward(self, state: State) -> State:
        """See the class.

        Raises:
            ModelError: An objective masks images, or see ``OneImageEmbedding``.
        """
        layout, online = state.layout, self.block
        assert isinstance(online, PairEmbeddings)
        if not self.acts(layout):
            return state
        if masked := sorted(layout.visual.keys() - {CLEAN}):
            raise ModelError(
                f"architecture 'vilt': got the masked images {masked[0]!r}; allowed are whole ones; take the objective "
                "out or change model.kind"
            )
        token_ids = torch.cat([state[ids_name(name)] for name in layout.text])
        kinds = online.modalities.to(self.dtype)
        visual = online.visual(state["frames"], self.dtype, state.get("grids")) + kinds[IMAGE]
        text = online.text(token_ids, self.dtype) + kinds[TEXT]
        mask = token_ids != self.pad
        seen = visual_mask(state, 1, "tokens first")
        return state.merged({"visual_input": visual, "text_input": text, "text_mask": mask, **seen})


class FusedLayer(StackBlock):
    """A pre-norm block over the fused rows."""

    stack = "fused"

    def __init__(self, index: int, sizes: Transformer, length: int, patches: Patches) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the transformer.
            length: L.
            patches: Sizes of images and patches.
        """
        super().__init__(index, sizes, lambda own: UnifiedBlock(own, index))
        self.length, self.patches = length, patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the fused rows."""
        assert isinstance(self.block, UnifiedBlock)
        words, seen = self.length if tokens is None else tokens, visual_positions(self.patches, layout)
        row = self.block.flops(words + seen, self.length + seen)
        return self.backward.passes * num_rows(layout.fused) * row

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Experts of clips, since there are no clips."""
        yield from super().idle_parameters(layouts)
        if any(self.acts(layout) for layout in layouts):
            yield from self.idle_experts({("text", True), ("image", True)})

    def forward(self, state: State) -> State:
        """Advances ``fused``."""
        if not self.acts(state.layout):
            return state
        (joined,), sums = self.run(joined_stream(state))
        return self.with_routing(state.updated(fused=joined), sums)


class NormAndPooler(nn.Module):
    """The normalisation and the pooler after the last block."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(hidden_size, eps)
        self.pooler = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, pools: bool, place: int = 0) -> tuple[Tensor, Tensor | None]:
        """``x [R, S, D]`` normalised and, if ``pools``, ``tanh`` of a map of the position ``place``, ``[R, D]``."""
        x = self.norm(x)
        return x, torch.tanh(self.pooler(x[:, place])) if pools else None


class FusedNorm(BlockLayer):
    """The normalisation at the end, and the pooler of the text's first position, or of a class token behind the text.

    Keeps the text positions of ``fused``, and adds ``fused_visual/{segment}`` for rows whose visual positions a loss
    reads, and ``pooled`` if it is read.
    """

    stack = "fused"

    def __init__(self, sizes: Transformer, *, has_class: bool = False) -> None:
        """Builds the layer.

        Args:
            sizes: Of the transformer.
            has_class: Whether rows have a class token between text and patches, which is pooled.
        """
        super().__init__("fused_norm", lambda still: NormAndPooler(sizes.hidden_size, sizes.norm_eps))
        self.has_class = has_class

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the pooler."""
        assert isinstance(self.block, NormAndPooler)
        pooler = self.block.pooler
        rows = num_rows(layout.fused) if "pooled" in layout.reads else 0
        return self.backward.passes * rows * 2.0 * pooler.in_features * pooler.out_features

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """All parameters if there are no fused rows; the pooler if no loss reads it."""
        assert isinstance(self.block, NormAndPooler)
        active = [layout for layout in layouts if self.acts(layout)]
        if not active:
            yield from self.block.norm.parameters()
        if not any("pooled" in layout.reads for layout in active):
            yield from self.block.pooler.parameters()

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        first_patch = state["fused"].shape[1] - state["memory"].shape[1]
        length = first_patch - self.has_class
        x, pooled = self.run(state["fused"], "pooled" in layout.reads, length if self.has_class else 0)
        seen = {f"fused_visual/{name}": x[layout.fused[name], first_patch:] for name in layout.fused_visual}
        whole = {} if pooled is None else {"pooled": pooled}
        left = {"fused": x[:, :length], "fused_mask": state["fused_mask"][:, :length]}
        return state.merged({**left, **seen, **whole})

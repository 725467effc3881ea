"""The first layer of architectures in which a language model reads all texts: pixels alone."""

import torch
from torch import nn

from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.block import EmbeddingLayer
from omnivl.parts.patches import num_patches
from omnivl.parts.plain_vit import ImageEmbedding
from omnivl.parts.sizes import Patches, Transformer


class PictureTables(nn.Module):
    """The embedding of pictures as CLIP's, under the name that it has in every architecture."""

    def __init__(self, patches: Patches, vision: Transformer) -> None:
        super().__init__()
        self.visual = ImageEmbedding(patches, vision, bias=False)


class EmbedPictures(EmbeddingLayer):
    """Pixels to the start of ``visual``."""

    def __init__(self, patches: Patches, vision: Transformer, dtype: torch.dtype) -> None:
        """Builds the embedding.

        Args:
            patches: Sizes of pictures and patches.
            vision: The stack that reads the patches.
            dtype: The compute dtype.
        """
        super().__init__(lambda still: PictureTables(patches, vision), dtype)
        self.sizes = patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the patches. No gradient flows into pixels: one product less."""
        assert isinstance(self.block, PictureTables)
        one = self.block.visual.flops(layout.num_frames, num_patches(self.sizes, layout))
        return num_rows(layout.visual) * self.backward.passes_on_pixels * one

    def forward(self, state: State) -> State:
        """Adds ``visual``."""
        if not self.acts(state.layout):
            return state
        assert isinstance(self.block, PictureTables)
        return state.updated(visual=self.block.visual(state["frames"], self.dtype))

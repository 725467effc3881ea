"""The first layer of architectures with separate encoders, without temporal positions.

Shapes: B samples, T frames, H x W pixels, L text positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from omnivl.chain.demands import CLEAN, TWIN
from omnivl.chain.flops import num_rows, twin_rows
from omnivl.chain.positions import ids_name, kept_positions
from omnivl.chain.state import State, StepLayout, joined
from omnivl.parts.block import EmbeddingLayer
from omnivl.parts.embed import TextEmbedding, twins_see
from omnivl.parts.patches import num_patches
from omnivl.parts.plain_vit import ImageEmbedding
from omnivl.parts.ragged import kept_visual_positions, visual_mask
from omnivl.parts.sizes import MomentumConfig, Patches, Transformer, Words


class Towers(nn.Module):
    """Embeddings of both encoders: the module that ``EmbedTowers`` trains and that its momentum twin copies."""

    def __init__(
        self,
        patches: Patches,
        vision: Transformer,
        words: Words,
        text: Transformer,
        *,
        bias: bool,
        masks: bool,
        embed_texts: Callable[[Words, Transformer], nn.Module] = TextEmbedding,
    ) -> None:
        super().__init__()
        self.visual = ImageEmbedding(patches, vision, bias=bias, masks=masks)
        self.text = embed_texts(words, text)


class EmbedTowers(EmbeddingLayer):
    """Pixels and token ids to the start of each stream.

    Masked visual segments read ``{name}/rows`` and ``{name}/mask``. Causal joins and text segments other than the clean
    one read ``{name}/token_ids``. When decoding with a cache, the generation stream starts at position ``cache/start``.
    """

    def __init__(
        self,
        patches: Patches,
        vision: Transformer,
        words: Words,
        text: Transformer,
        reads: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        *,
        bias: bool = True,
        masks: bool = False,
        momentum: MomentumConfig | None = None,
        embed_texts: Callable[[Words, Transformer], nn.Module] = TextEmbedding,
    ) -> None:
        """Builds the embeddings.

        Args:
            patches: Sizes of pictures and patches.
            vision: The stack that reads the patches.
            words: Of the texts.
            text: The stack that reads the words.
            reads: Maps token ids ``[R, L]`` to bool ``[R, L]``: where a text has tokens.
            dtype: The compute dtype.
            bias: Whether the patch embedding has one.
            masks: Whether patches may be masked. Momentum twins see whole pictures.
            momentum: Of the twin; None builds none.
            embed_texts: Makes the embedding of texts.
        """

        def build(still: bool) -> nn.Module:
            texts = text.still() if still else text
            return Towers(patches, vision, words, texts, bias=bias, masks=masks, embed_texts=embed_texts)

        super().__init__(build, dtype, momentum)
        self.sizes, self.reads = patches, reads

    def acts(self, layout: StepLayout) -> bool:
        """Whether a stream starts here."""
        return bool(layout.visual or layout.text or layout.generation)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the patches."""
        assert isinstance(self.block, Towers)
        one = self.block.visual.flops(layout.num_frames, num_patches(self.sizes, layout))
        # Masked passes reuse the products of the whole pictures. No gradient flows into pixels: one product less.
        rows = min(num_rows(layout.visual), layout.batch_size)
        return (rows * self.backward.passes_on_pixels + twin_rows(layout, "visual")) * one

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The embedding of an encoder that no step uses."""
        assert isinstance(self.block, Towers)
        visual = self.block.visual
        if not any(layout.visual for layout in layouts):
            yield from visual.parameters()
        elif visual.mask_token is not None and all(layout.visual.keys() <= {CLEAN} for layout in layouts):
            yield visual.mask_token
        if not any(layout.text or layout.generation for layout in layouts):
            yield from self.block.text.parameters()

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """See ``ChainLayer``."""
        pictures = kept_visual_positions(state, state.layout.num_frames, "frame by frame")
        return kept_positions(state, self.reads) | pictures

    def forward(self, state: State) -> State:
        """Adds ``visual``, ``text``, ``generation``, their masks, and the twins' streams, as the layout asks."""
        layout, online, twin = state.layout, self.block, self.momentum_block
        assert isinstance(online, Towers)
        made: dict[str, Tensor] = {}
        if layout.visual:
            masked = [(state[f"{name}/rows"], state[f"{name}/mask"]) for name in layout.visual if name != CLEAN]
            seen = state["frames"], self.dtype, state.get("grids")
            made["visual"] = online.visual(*seen, masked, CLEAN in layout.visual)
            made |= visual_mask(state, layout.num_frames, "frame by frame")
        if layout.text:
            token_ids = words_of(state, layout.text)
            made |= {"text": online.text(token_ids, self.dtype), "text_mask": self.reads(token_ids)}
        if layout.generation:
            token_ids = words_of(state, [layout.joins[name].text for name in layout.generation])
            start = int(state["cache/start"]) if "cache/start" in state else 0
            made |= {
                "generation": online.text(token_ids, self.dtype, start),
                "generation_mask": self.reads(token_ids),
            }
        if layout.twins:
            assert isinstance(twin, Towers), "the layout asks for momentum twins, none was built"
            with torch.no_grad():
                if "visual" in layout.twins:
                    made[TWIN + "visual"] = twin.visual(twins_see(state), self.dtype, state.get("grids"))
                if "text" in layout.twins:
                    made[TWIN + "text"] = twin.text(words_of(state, layout.twins["text"]), self.dtype)
        return state.merged(made)


def words_of(state: State, segments: Iterable[str]) -> Tensor:
    """Token ids of text segments, concatenated, int64 ``[R, L]``."""
    return joined([state[ids_name(name)] for name in segments])

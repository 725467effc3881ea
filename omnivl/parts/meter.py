"""What lies above the two encoders of METER: maps into one width, fusion by co-attention or merged attention, poolers.

Shapes: S visual positions, L text positions, R fused rows, D hidden size of the fusion.

Fused rows hold the text, then the image. Blocks are BERT's, in post-norm order.

Source: Dou et al., METER, arXiv 2111.02387, section 3.2 and figure 2; numbers as in its released code
    (``meter/modules/bert_model.py``, ``BertCrossLayer``; ``meter/modules/meter_module.py``).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.bert import BertBlock
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.decoder import GroundedBlock
from omnivl.parts.linear import Linear, draw_normal
from omnivl.parts.patches import visual_positions
from omnivl.parts.sizes import Patches, Transformer

_STREAMS = ("visual", "text")


class Maps(nn.Module):
    """Linear maps of the encoders' outputs into the fusion, and an embedding of each modality."""

    def __init__(self, vision: Transformer, text: Transformer, fusion: Transformer) -> None:
        super().__init__()
        sizes = {"visual": vision, "text": text}
        self.projections = nn.ModuleDict(
            {name: Linear(one.hidden_size, fusion.hidden_size) for name, one in sizes.items()}
        )
        self.types = nn.Parameter(torch.empty(len(sizes), fusion.hidden_size))
        draw_normal(self.types, std=0.02)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The embeddings of modalities."""
        yield self.types

    def forward(self, x: Tensor, stream: str) -> Tensor:
        """``[R, positions, D]`` from a stream's ``[R, positions, D_stream]``; row 0 of the embeddings is the text's."""
        mapped: Tensor = self.projections[stream](x)
        return mapped + self.types[int(stream == "visual")].to(mapped.dtype)


class MapOutputs(BlockLayer):
    """Where rows are joined, adds ``visual_input`` and ``text_input``: what enters the fusion."""

    stack = "encoded"

    def __init__(
        self, vision: Transformer, text: Transformer, fusion: Transformer, length: int, patches: Patches
    ) -> None:
        """Builds the layer.

        Args:
            vision: The image encoder.
            text: The text encoder.
            fusion: The stack on top of both.
            length: L.
            patches: Sizes of images and patches.
        """
        super().__init__("encoded", lambda still: Maps(vision, text, fusion))
        self.length, self.patches = length, patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether rows are joined."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the maps."""
        assert isinstance(self.block, Maps)
        if not self.acts(layout):
            return 0.0
        positions = {
            "visual": num_rows(layout.visual) * visual_positions(self.patches, layout),
            "text": num_rows(layout.text) * (self.length if tokens is None else tokens),
        }
        sizes = {name: one.weight.numel() for name, one in self.block.projections.items() if isinstance(one, Linear)}
        return self.backward.passes * sum(2.0 * count * sizes[name] for name, count in positions.items())

    def forward(self, state: State) -> State:
        """See the class."""
        if not self.acts(state.layout):
            return state
        return state.merged({f"{stream}_input": self.run(state[stream], stream) for stream in _STREAMS})


class CoAttention(nn.Module):
    """A block for each modality, which attends to what the other modality's block reads.

    Source: Dou et al., METER, arXiv 2111.02387, figure 2 (a); Lu et al., ViLBERT, arXiv 1908.02265.
    """

    def __init__(self, sizes: Transformer, index: int) -> None:
        super().__init__()
        self.text = GroundedBlock(sizes, causal=False, index=index)
        self.visual = GroundedBlock(sizes, causal=False, index=index)

    def forward(self, x: Tensor, mask: Tensor, length: int, padded: bool, wanted: tuple[bool, bool]) -> Tensor:
        """Advances ``x [R, L + S, D]``.

        Args:
            x: Texts, then images.
            mask: bool ``[R, L + S]``, true where there is a token or a patch.
            length: L.
            padded: Whether images have padding.
            wanted: Whether the text's and the image's positions are read later; others stay as they are.
        """
        text, visual = x[:, :length], x[:, length:]
        words, patches = mask[:, :length], mask[:, length:] if padded else None
        read_text, read_visual = wanted
        advanced = self.text(text, words, visual, None, patches).y if read_text else text
        seen = self.visual(visual, patches, text, None, words).y if read_visual else visual
        return torch.cat([advanced, seen], dim=1)


class FusionLayer(StackBlock):
    """A block of the fusion: co-attention, or merged attention, in which one BERT block reads both modalities."""

    stack = "fused"

    def __init__(self, index: int, sizes: Transformer, length: int, patches: Patches, *, merged: bool) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the fusion.
            length: L.
            patches: Sizes of images and patches.
            merged: Whether attention is merged.
        """

        def build(own: Transformer) -> nn.Module:
            return BertBlock(own, index) if merged else CoAttention(own, index)

        super().__init__(index, sizes, build)
        self.length, self.patches, self.is_last = length, patches, index == sizes.layers - 1

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def wanted(self, layout: StepLayout) -> tuple[bool, bool]:
        """Whether the text's and the image's positions of the result are read."""
        every = not self.is_last or "pooled" in layout.reads
        return every or bool(layout.fused_text), every or bool(layout.fused_visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the fused rows."""
        words, seen = self.length if tokens is None else tokens, visual_positions(self.patches, layout)
        if isinstance(self.block, BertBlock):
            row = self.block.flops(words + seen, self.length + seen, first_only=False)
        else:
            assert isinstance(self.block, CoAttention)
            text, visual = self.block.text, self.block.visual
            read_text, read_visual = self.wanted(layout)
            row = read_text * (text.flops(words, self.length, seen) + text.cross.project_flops(seen))
            row += read_visual * (visual.flops(seen, seen, self.length) + visual.cross.project_flops(self.length))
        return self.backward.passes * num_rows(layout.fused) * row

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Of the last block, the side that no loss reads."""
        active = [layout for layout in layouts if self.acts(layout)]
        if not active:
            yield from super().idle_parameters(layouts)
        elif isinstance(self.block, CoAttention):
            for place, side in enumerate((self.block.text, self.block.visual)):
                if not any(self.wanted(layout)[place] for layout in active):
                    yield from side.parameters()

    def forward(self, state: State) -> State:
        """Advances ``fused``."""
        if not self.acts(state.layout):
            return state
        x, mask = state["fused"], state["fused_mask"]
        if isinstance(self.block, BertBlock):
            return state.updated(fused=self.run(x, mask).y)
        length, padded = x.shape[1] - state["memory"].shape[1], "memory_mask" in state
        return state.updated(fused=self.run(x, mask, length, padded, self.wanted(state.layout)))


class BothPoolers(nn.Module):
    """``tanh`` of a map of the first position of each modality."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.text, self.visual = Linear(hidden_size, hidden_size), Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """``[R, 2 D]``: text, then image, of positions ``[R, D]``."""
        return torch.cat([torch.tanh(self.text(text)), torch.tanh(self.visual(visual))], dim=-1)


class PoolBoth(BlockLayer):
    """The end of the fusion: adds ``pooled`` if it is read.

    ``fused`` keeps the text's positions; ``fused_visual/{segment}`` are the images' of rows of which a loss reads them.
    """

    stack = "fused"

    def __init__(self, sizes: Transformer) -> None:
        super().__init__("fused_pool", lambda still: BothPoolers(sizes.hidden_size))

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the poolers."""
        assert isinstance(self.block, BothPoolers)
        rows = num_rows(layout.fused) if "pooled" in layout.reads else 0
        return self.backward.passes * rows * 4.0 * self.block.text.weight.numel()

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The poolers if no loss reads them."""
        if not any(self.acts(layout) and "pooled" in layout.reads for layout in layouts):
            yield from self.block.parameters()

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        x = state["fused"]
        length = x.shape[1] - state["memory"].shape[1]
        made = {f"fused_visual/{name}": x[layout.fused[name], length:] for name in layout.fused_visual}
        if "pooled" in layout.reads:
            made["pooled"] = self.run(x[:, 0], x[:, length])
        return state.merged({"fused": x[:, :length], "fused_mask": state["fused_mask"][:, :length], **made})

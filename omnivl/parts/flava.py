"""What lies between the encoders of FLAVA and its multimodal one, and that one's blocks.

Shapes: S visual positions, L text positions, R fused rows, D hidden size of the multimodal encoder.

Source: Singh et al., FLAVA, arXiv 2112.04482, section 3.1, and its released code (torchmultimodal, transformers): the
    multimodal encoder reads linear maps of the encoders' outputs before their last normalisation, and a class token of
    its own. It has no positions.
Differs: the class token stands between words and patches instead of first, which no block can tell.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from omnivl.chain.demands import CLEAN
from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.block import BlockLayer
from omnivl.parts.join import JoinRows, Sides
from omnivl.parts.linear import LayerNorm, Linear
from omnivl.parts.patches import visual_positions
from omnivl.parts.sizes import Patches, Transformer
from omnivl.parts.vilt import FusedLayer


class Outputs(nn.Module):
    """The last normalisation of both encoders, and the maps of their outputs into the multimodal encoder."""

    def __init__(self, vision: Transformer, text: Transformer, fused: Transformer) -> None:
        super().__init__()
        stacks = {"visual": vision, "text": text}
        self.norms = nn.ModuleDict({name: LayerNorm(one.hidden_size, one.norm_eps) for name, one in stacks.items()})
        self.to_fused = nn.ModuleDict(
            {name: Linear(one.hidden_size, fused.hidden_size) for name, one in stacks.items()}
        )

    def forward(self, x: Tensor, stream: str, joins: bool) -> tuple[Tensor, Tensor | None]:
        """The normalised output ``[R, positions, D_stream]`` and, if it is joined, its map ``[R, positions, D]``."""
        return self.norms[stream](x), self.to_fused[stream](x) if joins else None


class EncoderOutputs(BlockLayer):
    """Normalises ``visual`` and ``text``; where rows are joined, adds ``visual_input`` and ``text_input``."""

    stack = "encoded"

    def __init__(
        self, vision: Transformer, text: Transformer, fused: Transformer, length: int, patches: Patches
    ) -> None:
        """Builds the layer.

        Args:
            vision: The image encoder.
            text: The text encoder.
            fused: The multimodal encoder.
            length: L.
            patches: Sizes of images and patches.
        """
        super().__init__("encoded", lambda still: Outputs(vision, text, fused))
        self.length, self.patches = length, patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether there is a stream."""
        return bool(layout.visual or layout.text)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the maps."""
        assert isinstance(self.block, Outputs)
        if not layout.fused:
            return 0.0
        positions = {
            "visual": num_rows(layout.visual) * visual_positions(self.patches, layout),
            "text": num_rows(layout.text) * (self.length if tokens is None else tokens),
        }
        sizes = {name: one.weight.numel() for name, one in self.block.to_fused.items() if isinstance(one, Linear)}
        return self.backward.passes * sum(2.0 * number * sizes[name] for name, number in positions.items())

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Maps where no rows are joined, and norms of streams of which only joined rows are read."""
        assert isinstance(self.block, Outputs)
        for stream in ("visual", "text"):
            if not any(_is_read_apart(layout, stream) for layout in layouts):
                yield from self.block.norms[stream].parameters()
            if not any(layout.fused and layout.segments(stream) for layout in layouts):
                yield from self.block.to_fused[stream].parameters()

    def forward(self, state: State) -> State:
        """See the class."""
        made: dict[str, Tensor] = {}
        for stream in ("visual", "text"):
            if stream in state:
                made[stream], mapped = self.run(state[stream], stream, bool(state.layout.fused))
                made |= {} if mapped is None else {f"{stream}_input": mapped}
        return state.merged(made)


def _is_read_apart(layout: StepLayout, stream: str) -> bool:
    """Whether a loss reads normalised rows of a stream."""
    masked = {name for name in layout.segments(stream) if name not in (CLEAN, *layout.joined)}
    return bool(masked or layout.reads & {stream, f"{stream}_embedding"})


class JoinOutputs(JoinRows):
    """Joins the maps of the encoders' outputs: text, then image."""

    def sides(self, state: State) -> Sides:
        """The maps."""
        inputs = {stream: state[f"{stream}_input"] for stream in ("visual", "text") if f"{stream}_input" in state}
        return super().sides(state.merged(inputs))


class ClassToken(nn.Module):
    """A learnt token in each row."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(hidden_size))
        nn.init.trunc_normal_(self.class_token, std=0.02, a=-0.04, b=0.04)

    def forward(self, rows: Tensor, place: int) -> Tensor:
        """``[R, S + 1, D]``: ``rows [R, S, D]`` with the token at a place."""
        token = self.class_token.to(rows.dtype).expand(len(rows), 1, -1)
        return torch.cat([rows[:, :place], token, rows[:, place:]], dim=1)


class FusedClass(BlockLayer):
    """Puts the class token of the multimodal encoder between words and patches of ``fused``."""

    stack = "fused"

    def __init__(self, hidden_size: int) -> None:
        super().__init__("fused_embed", lambda still: ClassToken(hidden_size))

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are fused rows."""
        return bool(layout.fused)

    def forward(self, state: State) -> State:
        """See the class."""
        if not self.acts(state.layout):
            return state
        mask, length = state["fused_mask"], state["fused"].shape[1] - state["memory"].shape[1]
        everywhere = torch.cat([mask[:, :length], mask.new_ones(len(mask), 1), mask[:, length:]], dim=1)
        return state.updated(fused=self.run(state["fused"], length), fused_mask=everywhere)


class MultimodalLayer(FusedLayer):
    """A pre-norm block over rows with a class token."""

    def __init__(self, index: int, sizes: Transformer, length: int, patches: Patches) -> None:
        """Builds block ``index``; the arguments are those of ``FusedLayer``."""
        super().__init__(index, sizes, length + 1, patches)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the fused rows."""
        return super().flops(layout, None if tokens is None else tokens + 1, number)

"""One transformer for the tokens of images, clips and texts, apart and joined.

Shapes: R rows, S positions of a row, L text positions, D hidden size.

In a step with joined rows each block runs twice: first on the visual and the text stream, each alone; then, after
``JoinRows``, on rows that join a text with an image or clip, text first, starting from their embeddings. Attention and
normalisation act on one row at a time; the feed-forward slot gets the tokens of all streams of a pass together, so that
routing sees all of them. Pre-norm, LayerScale and drop path are the visual encoder's. Within a clip every patch attends
to all patches of all frames.

Sources: Bao et al., VLMo, arXiv 2111.02358, section 3.1 and 3.2; Wang et al., BEiT-3, arXiv 2208.10442, section 2.1
    (Multiway: attention projections and norms by modality); Mustafa et al., LIMoE, arXiv 2206.02770, section 2.
Differs: VLMo and BEiT-3 know no clips.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import AttributeConfig, MoMEConfig
from moe.feed_forward import build_feed_forward, has_attention_experts, is_routed
from moe.sizes import slot_flops
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Segment, Tokens
from omnivl.chain.demands import TWIN
from omnivl.chain.flops import num_rows, twin_rows
from omnivl.chain.positions import kept_name
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import kept_attention, self_attention
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.drop_path import drop_path, drop_path_rates
from omnivl.parts.embed import encoded_rows
from omnivl.parts.linear import LayerNorm, Linear, Role
from omnivl.parts.patches import num_patches, num_times, visual_positions
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MODALITIES, MomentumConfig, Patches, Transformer
from omnivl.parts.streams import ByAttributes, ByModality, ByPerceptron, Part, Stream
from omnivl.parts.vit import VISUAL_MODALITIES, layer_scale

UNIFIED_EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """What differs between the blocks of VLMo, BEiT-3, LIMoE and ViLT besides the filling of their slots.

    Attributes:
        multiway: Whether attention projections and norms are by modality, as in BEiT-3.
        sub_norm: Whether blocks also normalise before the output projection of attention and before the second map of
            dense perceptrons, as in BEiT-3.
        norm_by_perceptron: Whether each perceptron by modality has a norm before it of its own, as in VLMo.
    """

    multiway: bool = False
    sub_norm: bool = False
    norm_by_perceptron: bool = False


def projection(sizes: Transformer, multiway: bool, index: int, outputs: int) -> ByModality:
    """An attention projection of block ``index``: one for all, by modality, or by attributes."""
    size, ffn = sizes.hidden_size, sizes.ffn
    if isinstance(ffn, AttributeConfig) and has_attention_experts(ffn, index, sizes.layers):
        return ByAttributes(ffn, size, outputs)
    return ByModality(lambda: Linear(size, outputs, matrices=outputs // size), multiway)


class UnifiedBlock(nn.Module):
    """One transformer block for any number of streams, without the chain around it."""

    def __init__(self, sizes: Transformer, index: int, variant: Variant = Variant()) -> None:
        super().__init__()
        size, multiway = sizes.hidden_size, variant.multiway
        self.num_heads, self.recomputes = sizes.num_heads, sizes.recompute
        self.dropout = sizes.dropout
        self.drop_path_rate = drop_path_rates(sizes.drop_path, sizes.layers)[index]
        self.reads_padding = is_routed(sizes.ffn, index, sizes.layers)
        slot = Slot(index, MODALITIES, MODALITIES, (False, True), sizes.layers)

        def norm() -> nn.Module:
            return LayerNorm(size, sizes.norm_eps)

        self.norm1 = ByModality(norm, multiway)
        self.qkv = projection(sizes, multiway, index, 3 * size)
        self.out_norm = ByModality(norm, multiway) if variant.sub_norm else None
        self.out = projection(sizes, multiway, index, size)
        self.scale1 = layer_scale(sizes)
        self.norm2: ByModality | ByPerceptron = ByModality(norm, multiway)
        if variant.norm_by_perceptron and isinstance(sizes.ffn, MoMEConfig):
            self.norm2 = ByPerceptron(norm, sizes.ffn, slot)
        if variant.sub_norm:
            slot = replace(slot, inner_norm_eps=sizes.norm_eps)
        self.ffn = build_feed_forward(sizes.ffn, size, sizes.inner_size, slot)
        self.hidden_size = size
        self.slot_flops = slot_flops(sizes.ffn, size, sizes.inner_size, index, sizes.layers)
        self.scale2 = layer_scale(sizes)
        if variant.sub_norm:
            self._raise_starting_values(sizes.layers)

    @torch.no_grad()
    def _raise_starting_values(self, layers: int) -> None:
        """Multiplies maps that do not choose what attention looks at by ``sqrt(log(2 * layers))``.

        Source: Wang et al., Magneto, arXiv 2210.06423, section 2.2: values, output projections and perceptrons.
        """
        gain = math.sqrt(math.log(2 * layers))
        for module in self.qkv.modules():
            if isinstance(module, Linear):
                module.weight[2 * self.hidden_size :].mul_(gain)
        for module in [*self.out.modules(), *self.ffn.modules()]:
            if isinstance(module, Linear):
                module.weight.mul_(gain)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``. Experts by attributes and their gates are none."""
        for projection in (self.qkv, self.out):
            for module in projection.modules() if type(projection) is ByModality else ():
                if isinstance(module, Linear):
                    yield "attention", module

    @property
    def by_position(self) -> tuple[ByModality | ByPerceptron, ...]:
        """Modules that have other weights for some positions."""
        every = (self.norm1, self.qkv, self.out_norm, self.out, self.norm2)
        return tuple(module for module in every if module is not None)

    def flops(self, tokens: float, positions: float) -> float:
        """Operations on one row of ``positions`` positions, ``tokens`` of which are not padding, forward.

        Padded positions count inside attention only.
        """
        return tokens * 8 * self.hidden_size**2 + 4 * positions**2 * self.hidden_size + tokens * self.slot_flops

    def forward(self, *streams: Stream) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Advances every stream.

        Returns:
            ``[R, S, D]`` of each, and the sums of the block's router, if it has one.
        """
        streams = tuple(stream.without_padding() for stream in streams)
        attended = [replace(stream, x=self._attend(stream)) for stream in streams]
        tokens = [
            piece.reshape(-1, piece.shape[-1])
            for stream in attended
            for piece in stream.cut(self.norm2(stream.x, stream))
        ]
        made: FeedForwardOutput = recomputed(
            self.recomputes == "ffn", self.ffn, torch.cat(tokens), self._tokens(attended)
        )
        pieces = iter(torch.split(made.y, [len(piece) for piece in tokens]))
        return tuple(self._add(stream, pieces) for stream in attended), made.router_sums

    def _attend(self, stream: Stream) -> Tensor:
        qkv = self.qkv(self.norm1(stream.x, stream), stream)
        again, heads, mask = self.recomputes == "attention", self.num_heads, stream.mask
        if stream.padding is None:
            made = recomputed(again, self_attention, qkv, heads, mask)
        else:
            made = recomputed(again, kept_attention, qkv, stream.padding, heads, mask)
        if self.out_norm is not None:
            made = self.out_norm(made, stream)
        return self._leave(stream, self.scale1(self.out(made, stream)))

    def _leave(self, stream: Stream, branch: Tensor) -> Tensor:
        """The stream with a branch's output added."""
        branch = F.dropout(branch, self.dropout, self.training)
        return stream.x + drop_path(branch, self.drop_path_rate, self.training, stream.padding)

    def _tokens(self, streams: Sequence[Stream]) -> Tokens:
        """The tokens for the feed-forward slot: part by part, row by row within a part."""
        segments = tuple(
            Segment(part.modality, piece.shape[:-1].numel(), stream.fused, attributes)
            for stream in streams
            for part, piece, attributes in zip(stream.parts, stream.cut(stream.x), stream.attributes, strict=True)
        )
        if not self.reads_padding or all(stream.mask is None for stream in streams):
            return Tokens(segments)
        masks = [_valid(stream) for stream in streams]
        pieces = [piece for stream, mask in zip(streams, masks, strict=True) for piece in stream.cut(mask)]
        return Tokens(segments, torch.cat([piece.reshape(-1) for piece in pieces]))

    def _add(self, stream: Stream, pieces: Iterator[Tensor]) -> Tensor:
        made = [next(pieces).view_as(piece) for piece in stream.cut(stream.x)]
        x = self._leave(stream, self.scale2(stream.put_together(made)))
        return x if stream.padding is None else stream.padding.restore(x)


def _valid(stream: Stream) -> Tensor:
    """Which positions of a stream hold a token."""
    valid, x = stream.valid, stream.x
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid


class TwicePassed(BlockLayer):
    """Base of the layers of the unified transformer, which act on all streams, before and after the join of rows."""

    stack = "unified"

    def acts(self, layout: StepLayout) -> bool:
        """Whether there is any stream."""
        return bool(layout.visual or layout.text or layout.fused)

    def acts_on_pass(self, layout: StepLayout, number: int) -> bool:
        """The first pass runs separate rows, the second joined ones."""
        if number > 0:
            return bool(layout.fused)
        return any(_any(encoded_rows(layout, stream)) for stream in ("visual", "text"))

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """All parameters if no step has a stream, else those that no token uses."""
        active = [layout for layout in layouts if self.acts(layout)]
        if active:
            yield from self.idle(active)
        else:
            yield from self.parameters()

    @abstractmethod
    def idle(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters that no token uses under layouts that all have streams."""


class UnifiedLayer(TwicePassed, StackBlock):
    """A unified block in the chain, which runs it twice: before and after the join of rows."""

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        variant: Variant,
        patches: Patches,
        length: int,
        momentum: MomentumConfig | None = None,
    ) -> None:
        """Builds block ``index``.

        Args:
            index: Which block.
            sizes: Of the transformer.
            variant: Of the block.
            patches: Sizes of pictures and patches.
            length: L.
            momentum: Of its twin; None builds none.
        """
        super().__init__(index, sizes, lambda own: UnifiedBlock(own, index, variant), momentum)
        self.patches, self.length = patches, length

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on both streams and their twins, which have every patch; in a second pass on the joined rows."""
        assert isinstance(self.block, UnifiedBlock)
        length, seen = self.length, visual_positions(self.patches, layout)
        tokens = length if tokens is None else tokens
        if number > 0:
            return self.backward.passes * num_rows(layout.fused) * self.block.flops(tokens + seen, length + seen)
        visual, text = self.block.flops(seen, seen), self.block.flops(tokens, length)
        images, texts = (encoded_rows(layout, stream) for stream in ("visual", "text"))
        every = 1 + num_times(self.patches, layout) * num_patches(self.patches, layout)
        online: float = (images.stop - images.start) * visual + (texts.stop - texts.start) * text
        twins = twin_rows(layout, "visual") * self.block.flops(every, every) + twin_rows(layout, "text") * text
        return self.backward.passes * online + twins

    def idle(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters of modalities that no step has."""
        block, reached = self.block, {token for layout in layouts for token in reached_tokens(layout)}
        assert isinstance(block, UnifiedBlock)
        for module in block.by_position:
            yield from module.idle(reached)
        yield from self.idle_experts(reached)

    def forward(self, state: State) -> State:
        """Advances ``fused`` if the state has it, else ``visual`` and ``text``, and their twins."""
        if "fused" in state:
            (joined,), sums = self.run(joined_stream(state))
            return self.with_routing(state.updated(fused=joined), sums)
        names = waiting_streams(state)
        if not names:
            return state
        made, sums = self.run(*(separate_stream(state, name) for name in names))
        state = state.updated(**dict(zip(names, made, strict=True)))
        if twins := twin_streams(state):
            moved = self.run_twin(*(separate_stream(state, name, TWIN) for name in twins))[0]
            state = state.merged({TWIN + name: x for name, x in zip(twins, moved, strict=True)})
        return self.with_routing(state, sums)


class UnifiedNorm(TwicePassed):
    """The normalisation at the end of the unified encoder, of either pass."""

    def __init__(self, sizes: Transformer, multiway: bool, momentum: MomentumConfig | None = None) -> None:
        def build(still: bool) -> nn.Module:
            return ByModality(lambda: LayerNorm(sizes.hidden_size, sizes.norm_eps), multiway)

        super().__init__("unified_norm", build, momentum=momentum)

    def idle(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters of a side that is never read. Texts of joined rows are always read, visuals by some losses."""
        assert isinstance(self.block, ByModality)
        read = {
            (modality, fused)
            for layout in layouts
            for modality, fused in reached_tokens(layout)
            if not fused or modality == "text" or layout.fused_visual
        }
        yield from self.block.idle(read)

    def forward(self, state: State) -> State:
        """Normalises the streams that ``UnifiedLayer`` advances.

        Of joined rows it keeps the text in ``fused``, and in ``fused_visual/{segment}`` the visual positions that a
        loss reads.
        """
        if "fused" in state:
            stream = joined_stream(state)
            length = stream.parts[0].length
            for name in state.layout.fused_visual:
                visual = Stream(stream.x[state.layout.fused[name], length:], stream.parts[1:])
                state = state.merged({f"fused_visual/{name}": self.block(visual.x, visual)})
            text = Stream(stream.x[:, :length], stream.parts[:1])
            return state.updated(fused=self.block(text.x, text), fused_mask=state["fused_mask"][:, :length])
        names = waiting_streams(state)
        for name in names:
            stream = separate_stream(state, name)
            state = state.updated(**{name: self.block(stream.x, stream)})
        for name in twin_streams(state) if names else ():
            twin = separate_stream(state, name, TWIN)
            state = state.merged({TWIN + name: self.run_twin(twin.x, twin)})
        return state


def waiting_streams(state: State) -> list[str]:
    """The streams of the first pass; none after the layers that read them."""
    if "visual_embedding" in state or "text_embedding" in state:
        return []
    return [name for name in ("visual", "text") if name in state and len(state[name]) > 0]


def twin_streams(state: State) -> list[str]:
    """The streams that momentum twins advance, in the order in which the block takes them."""
    return [name for name in ("visual", "text") if name in state.layout.twins]


def separate_stream(state: State, name: str, prefix: str = "") -> Stream:
    """The stream ``visual`` or ``text`` of a state; with a prefix, its momentum twin's."""
    x = state[prefix + name]
    if name == "visual":
        kept = state.get(kept_name(f"{prefix}visual"))
        return Stream(x, (_visual_part(x.shape[1], state.layout),), _visual_mask(state, prefix), kept)
    mask = state.of_twins("text_mask", "text") if prefix else state["text_mask"][encoded_rows(state.layout, "text")]
    return Stream(x, (Part("text", x.shape[1]),), mask, state.get(kept_name(f"{prefix}text")))


def _visual_mask(state: State, prefix: str) -> Tensor | None:
    if "visual_mask" not in state:
        return None
    if prefix:
        return state.of_twins("visual_mask", "visual")
    return state["visual_mask"][encoded_rows(state.layout, "visual")]


def joined_stream(state: State) -> Stream:
    """The rows that ``JoinRows`` made: text first."""
    x, seen = state["fused"], state["memory"].shape[1]
    parts = Part("text", x.shape[1] - seen), _visual_part(seen, state.layout)
    return Stream(x, parts, state["fused_mask"])


def _any(rows: slice) -> bool:
    return bool(rows.stop > rows.start)


def _visual_part(length: int, layout: StepLayout) -> Part:
    return Part(VISUAL_MODALITIES[layout.is_video], length)


def reached_tokens(layout: StepLayout) -> list[tuple[str, bool]]:
    """(modality, fused) of the tokens that a step sends through the blocks."""
    visual = VISUAL_MODALITIES[layout.is_video]
    separate = {"visual": visual, "text": "text"}
    found = [(modality, False) for stream, modality in separate.items() if _any(encoded_rows(layout, stream))]
    return found + ([("text", True), (visual, True)] if layout.fused else [])

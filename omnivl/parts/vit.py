"""The unified visual encoder: one transformer for images and videos.

Shapes: R rows, T time positions (frames / tubelet size), N patches of a frame, S = 1 + T * N, D hidden size.

- pre-norm ViT blocks, GELU, optional LayerScale, drop path and bias by relative position (``VisionConfig``);
- divided space-time attention: time over the same patch of all frames (videos only), then space within each frame with
  the class token repeated per frame and averaged afterwards;
- the projection after the temporal attention starts from zero in every block, so that a clip of T equal frames gives
  exactly the image's result. With ``temporal_gain`` above 0 it does not, and motion is learnt sooner.

Source: Bertasius et al., TimeSformer, arXiv 2102.05095, section 3 and figure 2.
Differs: TimeSformer's code leaves the temporal projection of block 0 at random; here all are zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe.feed_forward import build_feed_forward, is_routed
from moe.sizes import slot_flops
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Tokens
from moe.working import working
from omnivl.chain.backward import VISUAL
from omnivl.chain.demands import TWIN
from omnivl.chain.flops import num_rows, twin_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.attention import SelfAttention
from omnivl.parts.attributes import attributes_of
from omnivl.parts.block import BlockLayer, StackBlock
from omnivl.parts.drop_path import drop_path, drop_path_rates
from omnivl.parts.linear import LayerNorm, Linear, Role
from omnivl.parts.padding import Padding
from omnivl.parts.patches import kept_patches, num_patches, num_times
from omnivl.parts.ragged import Ragged
from omnivl.parts.recompute import recomputed
from omnivl.parts.relative import RelativePositions
from omnivl.parts.sizes import MODALITIES, MomentumConfig, Patches, Transformer

VISUAL_MODALITIES = ("image", "video")


class LayerScale(nn.Module):
    """Multiplies a branch by a learnt vector. Source: Touvron et al., CaiT, arXiv 2103.17239, eq. 4."""

    def __init__(self, size: int, initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Scales ``[..., D]``."""
        return x * working(self.weight, x.dtype)


def layer_scale(sizes: Transformer) -> nn.Module:
    """A LayerScale, or the identity if the configuration has none."""
    if sizes.layer_scale_init is None:
        return nn.Identity()
    return LayerScale(sizes.hidden_size, sizes.layer_scale_init)


class TemporalAttention(nn.Module):
    """Attention of each patch over time, with a projection that starts from zero or near it."""

    def __init__(self, sizes: Transformer, gain: float) -> None:
        super().__init__()
        self.norm = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        self.attention = SelfAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention")
        self.temporal_fc = Linear(sizes.hidden_size, sizes.hidden_size, zero=gain == 0)
        with torch.no_grad():
            self.temporal_fc.weight.mul_(gain)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield "attention", self.temporal_fc

    def flops(self, times: int, patches: float) -> float:
        """Operations on one clip of ``times`` temporal positions and ``patches`` patches of a frame, forward."""
        projection = 2 * self.temporal_fc.in_features * self.temporal_fc.out_features
        return patches * (self.attention.flops(times, times) + times * projection)

    def forward(self, patches: Tensor, places: Padding | None = None) -> Tensor:
        """The temporal branch ``[R, T, N, D]`` of ``patches [R, T, N, D]``.

        Args:
            patches: Frame by frame.
            places: Which places of a frame are left out, of ``[R, N]``; there the branch is zero.
        """
        rows, times, num_patches, size = patches.shape
        if places is not None:
            over_time = places.drop(patches.transpose(1, 2).flatten(2)).view(-1, times, size)
            made: Tensor = self.temporal_fc(self.attention(self.norm(over_time)))
            return places.restore(made.flatten(1)).view(rows, num_patches, times, size).transpose(1, 2)
        x = self.norm(patches).transpose(1, 2).flatten(0, 1)
        out: Tensor = self.temporal_fc(self.attention(x))
        return out.reshape(rows, num_patches, *x.shape[1:]).transpose(1, 2)


def valid_tokens(ragged: Ragged | None, padding: Padding | None, first_only: bool) -> Tensor | None:
    """Which tokens of a block are no padding; None: all, as class tokens are."""
    if ragged is None or first_only:
        return None
    return ragged.mask if padding is None else padding.valid


class VisualModule(nn.Module, ABC):
    """Base of the transformer blocks of visual encoders, which ``VisualBlock`` puts into the chain."""

    @abstractmethod
    def __init__(self, sizes: Transformer, patches: Patches, index: int) -> None:
        """Builds block ``index`` of a stack."""
        super().__init__()

    @abstractmethod
    def flops(self, times: int, patches: float, is_video: bool, first_only: bool) -> float:
        """Operations on one image or clip with ``patches`` patches of a frame, forward; the rest as in ``forward``."""

    @abstractmethod
    def forward(
        self, x: Tensor, times: int, is_video: bool, first_only: bool = False, ragged: Ragged | None = None
    ) -> FeedForwardOutput:
        """Advances ``x [R, S, D]``, with the positions of the embedding before the blocks.

        Args:
            x: The visual stream.
            times: T.
            is_video: Whether rows are clips.
            first_only: Whether only class tokens are wanted.
            ragged: Which positions hold something; None: all.
        """

    def idle_without_clips(self) -> Iterator[nn.Parameter]:
        """The parameters that images do not use."""
        yield from ()


class DividedBlock(VisualModule):
    """A block with divided space-time attention, without the chain around it."""

    def __init__(self, sizes: Transformer, patches: Patches, index: int) -> None:
        super().__init__(sizes, patches, index)
        self.recomputes_ffn = sizes.recompute == "ffn"
        self.drop_path_rate = drop_path_rates(sizes.drop_path, sizes.layers)[index]
        self.temporal = TemporalAttention(sizes, patches.temporal_gain)
        self.norm1 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        self.attention = SelfAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention")
        self.scale1 = layer_scale(sizes)
        self.norm2 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        side = patches.grid(is_video=False)[0]
        self.relative = RelativePositions(side, sizes.num_heads) if patches.relative_positions else None
        slot = Slot(index, VISUAL_MODALITIES, MODALITIES, depth=sizes.layers, activation=sizes.activation)
        self.ffn = build_feed_forward(sizes.ffn, sizes.hidden_size, sizes.inner_size, slot)
        self.slot_flops = slot_flops(sizes.ffn, sizes.hidden_size, sizes.inner_size, index, sizes.layers)
        self.scale2 = layer_scale(sizes)

    def flops(self, times: int, patches: float, is_video: bool, first_only: bool) -> float:
        """Operations on one image or clip with ``patches`` patches of a frame, forward; the rest as in ``forward``."""
        frame = (
            self.attention.first_flops(1 + patches) if first_only else self.attention.flops(1 + patches, 1 + patches)
        )
        temporal = self.temporal.flops(times, patches) if is_video else 0.0
        return temporal + times * frame + (1 if first_only else 1 + times * patches) * self.slot_flops

    def forward(
        self, x: Tensor, times: int, is_video: bool, first_only: bool = False, ragged: Ragged | None = None
    ) -> FeedForwardOutput:
        """Advances ``x [R, 1 + T * N, D]``.

        Args:
            x: Class token, then patches frame by frame.
            times: T.
            is_video: Whether to apply temporal attention.
            first_only: Whether only the class token is wanted: the result is ``[R, 1, D]``.
            ragged: Which positions hold something; None: all.
        """
        if is_video:
            cls, patches = x[:, :1], x[:, 1:].reshape(x.shape[0], times, -1, x.shape[-1])
            places = None if ragged is None else Padding.worth_dropping(ragged.places(times), ragged.kept_places)
            patches = patches + drop_path(self.temporal(patches, places), self.drop_path_rate, self.training)
            x = torch.cat([cls, patches.flatten(1, 2)], dim=1)
        padding = None if ragged is None or first_only else ragged.padding()
        if ragged is None or times > 1 or padding is None:
            space = self._space(x, times, first_only, ragged)
            x = x[:, :1] if first_only else x
            if padding is not None:
                x, space = padding.drop(x), padding.drop(space)
        else:
            x = padding.drop(x)
            space = self.attention(self.norm1(x), ragged.mask, padding=padding)
        x = x + drop_path(self.scale1(space), self.drop_path_rate, self.training, padding)
        modality = VISUAL_MODALITIES[is_video]
        valid = valid_tokens(ragged, padding, first_only)
        tokens = Tokens.of(modality, x, valid, attributes=attributes_of(modality))
        out: FeedForwardOutput = recomputed(self.recomputes_ffn, self.ffn, self.norm2(x), tokens)
        y = x + drop_path(self.scale2(out.y), self.drop_path_rate, self.training, padding)
        return FeedForwardOutput(y if padding is None else padding.restore(y), out.router_sums)

    def idle_without_clips(self) -> Iterator[nn.Parameter]:
        """The temporal branch."""
        yield from self.temporal.parameters()

    def _space(self, x: Tensor, times: int, first_only: bool, ragged: Ragged | None) -> Tensor:
        """Spatial attention within each frame, ``[R, S, D]``, or ``[R, 1, D]`` of the class token."""
        x = self.norm1(x)
        scores = None if self.relative is None else self.relative((x.shape[1] - 1) // times)
        attend = self.attention.first if first_only else self.attention
        if times == 1:
            out: Tensor = attend(x, None if ragged is None else ragged.mask, scores=scores)
            return out
        rows, _, size = x.shape
        cls = x[:, None, :1].expand(rows, times, 1, size)
        frames = torch.cat([cls, x[:, 1:].reshape(rows, times, -1, size)], dim=2).flatten(0, 1)
        mask, padding = (None, None) if ragged is None else ragged.frames(times)
        if padding is None or first_only:
            frames = attend(frames, mask, scores=scores)
        else:
            frames = padding.restore(self.attention(padding.drop(frames), mask, padding=padding))
        frames = frames.reshape(rows, times, -1, size)
        # The mean, as first term plus mean difference from it, is exact if all terms are equal, for any number of them.
        first = frames[:, :1, 0]
        cls = first + (frames[:, :, 0] - first).mean(1, keepdim=True)
        return torch.cat([cls, frames[:, :, 1:].flatten(1, 2)], dim=1)


class VisualBlock(StackBlock):
    """A block of a visual encoder on all visual rows, and its momentum twin on those that objectives read of it."""

    stack = branch = VISUAL

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        patches: Patches,
        momentum: MomentumConfig | None = None,
        *,
        block: type[VisualModule] = DividedBlock,
        may_shorten: bool = True,
    ) -> None:
        """Builds block ``index`` of the encoder; the drop path rate rises with it.

        Args:
            index: Which block.
            sizes: Of the encoder.
            patches: Sizes of pictures and patches.
            momentum: Of its twin; None builds none.
            block: Class of the block: with a temporal branch, or without one (``omnivl.parts.plain_vit``).
            may_shorten: Whether the last block may compute the first position only, if no other is read.
        """
        super().__init__(index, sizes, lambda own: block(own, patches, index), momentum)
        self.patches = patches
        is_last = index == sizes.layers - 1
        self.may_shorten = may_shorten and is_last and not is_routed(sizes.ffn, index, sizes.layers)

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all visual rows, and of the twin, which sees every patch."""
        assert isinstance(self.block, VisualModule)
        times, first_only = num_times(self.patches, layout), self.may_shorten and layout.class_only
        kept, every = kept_patches(self.patches, layout), num_patches(self.patches, layout)
        row = self.block.flops(times, kept, layout.is_video, first_only)
        twin = self.block.flops(times, every, layout.is_video, first_only)
        return self.backward.passes * num_rows(layout.visual) * row + twin_rows(layout, "visual") * twin

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Without clips the temporal branch; and experts of modalities that no step has."""
        yield from super().idle_parameters(layouts)
        assert isinstance(self.block, VisualModule)
        if not any(layout.is_video for layout in layouts):
            yield from self.block.idle_without_clips()
        yield from self.idle_experts({(VISUAL_MODALITIES[one.is_video], False) for one in layouts if self.acts(one)})

    def unread_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Without clips the temporal branch too."""
        yield from super().unread_parameters(layouts)
        if not any(layout.is_video for layout in layouts):
            for block in (self.block, self.momentum_block):
                if isinstance(block, VisualModule):
                    yield from block.idle_without_clips()

    def forward(self, state: State) -> State:
        """Advances ``visual`` and, in a step with momentum, ``momentum_visual``."""
        if not self.acts(state.layout):
            return state
        times = num_times(self.patches, state.layout)
        inputs = times, state.layout.is_video, self.may_shorten and state.layout.class_only
        out: FeedForwardOutput = self.run(state["visual"], *inputs, Ragged.of(state))
        state = self.with_routing(state.updated(visual=out.y), out.router_sums)
        if "visual" in state.layout.twins:
            ragged = Ragged.of(state, f"{TWIN}visual")
            state = state.updated(momentum_visual=self.run_twin(state["momentum_visual"], *inputs, ragged).y)
        return state


class VisualNorm(BlockLayer):
    """The normalisation at the end of the visual encoder."""

    stack = branch = VISUAL

    def __init__(self, sizes: Transformer, momentum: MomentumConfig | None = None) -> None:
        super().__init__("visual_norm", lambda still: LayerNorm(sizes.hidden_size, sizes.norm_eps), momentum=momentum)

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def forward(self, state: State) -> State:
        """Normalises ``visual`` and, in a step with momentum, ``momentum_visual``."""
        if not self.acts(state.layout):
            return state
        state = state.updated(visual=self.block(state["visual"]))
        if "visual" in state.layout.twins:
            state = state.updated(momentum_visual=self.run_twin(state["momentum_visual"]))
        return state

"""The end of X-VLM's image encoder: frames and patches are averaged, and boxes of the image become rows of their own.

Shapes: M rows, T frames, N patches of a frame, R regions, D hidden size, g patches along a side.

Source: Zeng et al., X-VLM, arXiv 2111.08276, section 3.1; Zeng et al., X2-VLM, arXiv 2211.12402, section 3.2; patches
    of a box, mean and mask as in their released code (``get_image_attns``; the Swin encoder's forward).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from omnivl.chain.backward import VISUAL
from omnivl.chain.demands import CLEAN, REGIONS
from omnivl.chain.state import State, StepLayout, part
from omnivl.parts.block import BlockLayer
from omnivl.parts.embed import resize_times
from omnivl.parts.sizes import Patches

_EDGE = 1e-4  # of a patch: what a box may jut out by rounding


def patches_of_boxes(boxes: Tensor, side: int) -> Tensor:
    """Which patches boxes touch, bool ``[R, side * side]``; at least one each.

    Args:
        boxes: fp32 ``[R, 4]``: left, top, right, bottom as fractions.
        side: g.
    """
    first = (boxes[:, :2] * side + _EDGE).floor().clamp(0, side - 1)
    last = torch.maximum((boxes[:, 2:] * side - _EDGE).ceil().clamp(max=side), first + 1)
    places = torch.arange(side, device=boxes.device)
    across, down = ((places >= first[:, axis, None]) & (places < last[:, axis, None]) for axis in (0, 1))
    return (down[:, :, None] & across[:, None]).flatten(1)


def region_features(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``[R, 1 + N, D]`` of boxes, and which of their positions belong to them, bool ``[R, 1 + N]``.

    The first position of a row is the mean of the patches that the box touches; the others are all of the image's.

    Args:
        images: ``[M, 1 + N, D]``, R / M boxes for each; N is a square number.
        boxes: fp32 ``[R, 4]``: left, top, right, bottom as fractions.
    """
    patches = images[:, 1:]
    inside = patches_of_boxes(boxes, round(patches.shape[1] ** 0.5))
    each = inside.view(len(images), -1, patches.shape[1])
    share = (each / each.sum(-1, keepdim=True)).to(images.dtype)
    means = (share @ patches).flatten(0, 1)
    every = patches.repeat_interleave(each.shape[1], dim=0)
    return torch.cat([means[:, None], every], dim=1), torch.cat([torch.ones_like(inside[:, :1]), inside], dim=1)


class FrameMean(nn.Module):
    """The mean of a clip's frames, each with a learnt embedding, which starts from zero; then of its patches."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.zeros(frames, width)) if frames > 1 else None

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The frames' embeddings."""
        if self.times is not None:
            yield self.times

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes the frames' embeddings to another number of frames."""
        return resize_times(before, len(own)) if name == "times" else None

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps ``[M, T * (1 + N), D]``, frame by frame, to ``[M, 1 + N, D]``; the first is the mean of the others."""
        if frames > 1:
            x = x.reshape(len(x), frames, -1, x.shape[-1]).mean(1)
            if self.times is not None:
                x = x + resize_times(self.times, frames).mean(0).to(x.dtype)
        patches = x[:, 1:]
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


class VisualRegions(BlockLayer):
    """The end of the image encoder: ``visual`` as ``FrameMean`` makes it and, where they are read, the regions' rows.

    Adds ``regions``, ``regions_mask`` and, for both to be looked at in one step, ``visual_mask``.
    """

    stack = branch = VISUAL

    def __init__(self, width: int, patches: Patches) -> None:
        """Builds the frames' embeddings of an encoder of some ``width``."""
        super().__init__("visual_regions", lambda still: FrameMean(width, patches.num_frames))

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Without clips the frames' embeddings too."""
        yield from super().idle_parameters(layouts)
        active = [layout for layout in layouts if self.acts(layout)]
        if active and all(layout.num_frames == 1 for layout in active):
            assert isinstance(self.block, FrameMean)
            yield from self.block.undecayed()

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        visual = self.run(state["visual"], layout.num_frames)
        if not layout.regions:
            return state.updated(visual=visual)
        features, mask = region_features(part(visual, layout.visual[CLEAN]), state[f"{REGIONS}/boxes"])
        every = mask.new_ones(visual.shape[:2])
        return state.updated(visual=visual, visual_mask=every, regions=features, regions_mask=mask)

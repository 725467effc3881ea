"""Grounding by regression: the box of what a text speaks of.

Shapes: B samples, R rows, D width of a pooled fused row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omnivl.chain.demands import CLEAN, REGIONS, Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, ObjectiveLoss, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DataKind, is_label
from omnivl.data.fields import Field
from omnivl.objectives.regions import RegionObjective
from omnivl.parts.heads import Perceptron


@dataclass(frozen=True)
class Locate(RegionObjective):
    """Where in the image is what the text speaks of? A box is predicted from the fused row as a whole.

    A sample's field ``box`` is [left, top, right, bottom] as fractions of the view. Samples whose box the view does not
    show are left out and not counted. With ``regions`` each text about a region is located in the whole image.

    Attributes:
        field: Field with the box.
        l1_weight: Factor of the absolute differences of centre and size, summed.
        giou_weight: Factor of 1 - generalised intersection over union.

    Source: Zeng et al., X-VLM, arXiv 2111.08276, section 3.2: a multilayer perceptron on [CLS] that gives centre and
        size, the L1 and the generalised IoU loss (Rezatofighi et al., arXiv 1902.09630), equally weighted.
    """

    kind: Literal["locate"] = "locate"
    field: str = "box"
    l1_weight: float = 1.0
    giou_weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        for option in ("l1_weight", "giou_weight"):
            self.require(getattr(self, option) >= 0.0, option, "at least 0")

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """The box, or the regions."""
        return super().sample_fields if self.regions else {self.field: Field("boxes")}

    @property
    def _present(self) -> str:
        return f"{REGIONS}/located" if self.regions else f"field/{self.field}/present"

    @property
    def _boxes(self) -> str:
        return f"{REGIONS}/boxes" if self.regions else f"field/{self.field}"

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per sample, or per region."""
        if kind != "image_text" or is_label(kind):
            return None
        joins = {self.key: Join(self.pairs, CLEAN)}
        return Demands(joins=joins, reads=frozenset({"pooled"}), regions=self.regions)

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per text."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled"}))

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Centre and size from a pooled fused row."""
        return BoxHead(sizes.pooled)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The boxes in view."""
        return {self.key: state[self._present].sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The weighted sum of both losses, mean over the boxes in view.

        Metrics: ``iou``, their mean intersection over union; ``accuracy``, the share of 0.5 or more.
        """
        assert isinstance(heads.own, BoxHead)
        found, wanted, present = heads.own(state.pooled(self.key)), state[self._boxes], state[self._present]
        iou, giou = overlaps(corners(found), wanted)
        far = (found - centred(wanted)).abs().sum(dim=1)
        each = self.l1_weight * far + self.giou_weight * (1.0 - giou)
        count = present.sum()

        def mean(each: Tensor) -> Tensor:
            return replica_mean((each * present).sum(), count, gather, state.term_weight(self.key))

        metrics = {"iou": mean(iou.detach()), "accuracy": mean((iou >= 0.5).float())}
        return ObjectiveLoss(mean(each), metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The box for each text, fp32 ``[R, 4]``: left, top, right, bottom as fractions of the view."""
        assert isinstance(heads.own, BoxHead)
        return corners(heads.own(state.pooled(self.key))).clamp(0.0, 1.0)


class BoxHead(Perceptron):
    """A perceptron and a sigmoid, as in X-VLM."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 4)

    def forward(self, pooled: Tensor) -> Tensor:
        """Centre x, y, width, height in (0, 1), fp32 ``[R, 4]``, from ``[R, D]``."""
        return super().forward(pooled).sigmoid()


def corners(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom ``[..., 4]`` of centre x, y, width, height ``[..., 4]``."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def centred(boxes: Tensor) -> Tensor:
    """The inverse of ``corners``."""
    first, last = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def overlaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and its generalised form, of boxes ``[..., 4]`` of corners, pair by pair.

    The generalised form subtracts the share of the smallest enclosing box that neither covers: it has a gradient where
    boxes do not meet. Boxes without area have the value 0 and a finite gradient.
    """
    inner = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0.0)
    outer = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    shared, around = inner.prod(-1), outer.prod(-1)
    union = (one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - shared
    tiny = torch.finfo(one.dtype).eps
    iou = shared / union.clamp(min=tiny)
    return iou, iou - (around - union) / around.clamp(min=tiny)

"""Grounding by a choice: which of the image's regions does a text speak of?

Shapes: B samples, R rows, K regions of a sample, N patches of an image, P inner width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, ObjectiveLoss, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.fields import Field
from omnivl.objectives.patches import PatchObjective, PatchScores


@dataclass(frozen=True)
class Region(PatchObjective):
    """Which of several regions of the image is what the text speaks of?

    A region's features are the mean of those of the patches that its box covers, weighted by how much of each it
    covers; its score is their product with the fused row as a whole, both projected. A sample's field ``candidates``
    holds the boxes of its regions, ``target`` the index of the right one. A sample whose right region the view does not
    show is left out and not counted.

    Attributes:
        most_regions: K, the largest number of regions that a sample may have.
        field: Field with the regions' boxes.
        index: Field with the index of the right one.

    Source: Chen et al., UNITER, arXiv 1909.11740, section 4: a softmax over the regions of an image.
    Differs: UNITER's regions are inputs of the transformer and come from a detector.
    """

    kind: Literal["region"] = "region"
    most_regions: int = 8
    field: str = "candidates"
    index: str = "target"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.most_regions >= 2, "most_regions", "at least 2")

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """Boxes, and the index of the right one."""
        return {self.field: Field("boxes", most=self.most_regions), self.index: Field("number")}

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Projections of a pooled fused row and of patches."""
        return PatchScores(sizes.pooled, self.patch_width(sizes), self.inner_size)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The samples whose right region is in view."""
        return {self.key: self._shown(state).sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Cross-entropy over the regions in view, mean over the samples whose right one is. Metric: ``accuracy``."""
        assert isinstance(heads.own, PatchScores)
        shown, targets = self._shown(state), state[f"field/{self.index}"].long()
        scores = self.scores(state, heads.own, state[f"field/{self.field}"], state[f"field/{self.field}/present"])
        each = F.cross_entropy(scores, targets, reduction="none")
        count = shown.sum()
        loss = replica_mean(torch.where(shown, each, 0.0).sum(), count, gather, state.term_weight(self.key))
        with torch.no_grad():
            right = ((scores.argmax(1) == targets) & shown).sum() / count.clamp(min=1)
        return ObjectiveLoss(loss, {"accuracy": right})

    def scores(self, state: State, head: PatchScores, boxes: Tensor, present: Tensor) -> Tensor:
        """Scores of regions.

        Args:
            state: With the objective's rows.
            head: The head.
            boxes: fp32 ``[R, K, 4]``, corners as fractions.
            present: bool ``[R, K]``.

        Returns:
            fp32 ``[R, K]``, very low where there is no region.
        """
        query, keys = head(state.pooled(self.key), self.patches_of(state))
        side = round(keys.shape[1] ** 0.5)
        covered = coverage(boxes, side, side).flatten(2)
        mean = covered / covered.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scores = torch.einsum("rp,rnp,rkn->rk", query, keys, mean) / head.inner_size**0.5
        return torch.where(present, scores, -1e4)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The score of each patch of the image, fp32 ``[R, N]``, whose mean over a box is the region's score."""
        assert isinstance(heads.own, PatchScores)
        query, keys = heads.own(state.pooled(self.key), self.patches_of(state))
        scores: Tensor = torch.einsum("rp,rnp->rn", query, keys) / heads.own.inner_size**0.5
        return scores

    def _shown(self, state: State) -> Tensor:
        """Whether the right region is in view, bool ``[B]``."""
        present, targets = state[f"field/{self.field}/present"], state[f"field/{self.index}"].long()
        return present.gather(1, targets[:, None])[:, 0]


def coverage(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """How much of each cell of a grid boxes cover, fp32 ``[..., rows, columns]``, each from 0 to 1.

    Args:
        boxes: fp32 ``[..., 4]``: left, top, right, bottom as fractions.
        rows: Of the grid.
        columns: Of the grid.
    """

    def along(first: Tensor, last: Tensor, count: int) -> Tensor:
        edges = torch.arange(count, device=boxes.device, dtype=boxes.dtype)
        return (torch.minimum(last * count, edges + 1) - torch.maximum(first * count, edges)).clamp(0.0, 1.0)

    left, top, right, bottom = boxes[..., None].unbind(-2)
    return along(top, bottom, rows)[..., :, None] * along(left, right, columns)[..., None, :]

"""Base of MRM, MFM and MCM: a masked pass over some visual rows and a loss at the masked patches.

Shapes: B samples, M masked rows, T temporal positions, N patches of a frame, S = 1 + T * N, D hidden size, K masked
patches of all rows, C values of a patch (side * side * 3, times the tubelet size for clips).
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.backward import Backward
from omnivl.chain.demands import Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, Objective, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch, DataKind, visual_of
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit, UserError
from omnivl.objectives.codes import Codebook, CodeHead, TrainedCodes, pupils_of
from omnivl.objectives.masking import Mask, in_places
from omnivl.objectives.teacher import Pupil
from omnivl.parts.embed import unfold
from omnivl.parts.linear import Linear
from omnivl.parts.padding import selected

PIXEL_EPS = 1e-6

VisualTargets = Literal["pixels", "momentum"]
FeatureLoss = Literal["smooth_l1", "cosine"]


@dataclass(frozen=True)
class MaskedVisual(Objective):
    """Base of the masked-visual objectives.

    The masked pass runs the online encoder with a learnt token in place of masked patches; its rows are the segment
    ``{key}`` of the visual stream, ``[M, S, D]``.

    Attributes:
        probability: Share of patches, frames or clips to mask.
        targets: ``pixels``: the patch's own values, normalised per patch. ``momentum``: the momentum encoder's features
            of the patch, computed from the whole sample; needs the model's momentum twins.
        feature_loss: Distance to momentum targets.
        codebook: Makes classes of the targets: the loss is then the cross-entropy with the code of a patch's pixels,
            from -1 to 1, or of its features, or with that which a trained tokenizer gives. Null restores the targets.
        every: Only samples whose index i in the micro-batch satisfies ``i % every == offset`` get a masked pass.
        offset: See ``every``.
    """

    probability: float = 0.15
    targets: VisualTargets = "pixels"
    feature_loss: FeatureLoss = "smooth_l1"
    codebook: Codebook | None = None
    every: int = 1
    offset: int = 0

    on_videos: ClassVar[bool]
    """Whether the objective acts on clips; otherwise on images."""
    masks_times: ClassVar[bool] = False
    """Whether all patches of a temporal position are masked together, so that a clip needs at least two positions."""

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 < self.probability < 1.0, "probability", "above 0 and below 1")
        self.require(self.every >= 1, "every", "at least 1")
        self.require(0 <= self.offset < self.every, "offset", f"from 0 to every - 1 = {self.every - 1}")

    @abstractmethod
    def mask(self, random: np.random.Generator, times: int, grid: tuple[int, int]) -> Mask:
        """The mask of one sample, bool ``[T, N]``, N the patches of its own grid."""

    def require_times(self, times: int) -> None:
        """Refuses clips in which no frame would be left unmasked.

        Raises:
            UserError: ``times`` is below 2.
        """
        if times < 2:
            raise UserError(
                f"objective {self.key}: needs clips of at least 2 temporal positions, got {times}; "
                f"raise num_frames or lower tubelet_size"
            )

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """An ``every`` that does not divide the micro-batch; masked frames in clips of a single temporal position."""
        if batch_size >= 1 and batch_size % self.every:
            allowed = f"a divisor of micro_batch_size_per_gpu {batch_size}"
            yield Misfit(("every",), str(self.every), allowed, "change either")
        times = inputs.num_frames // max(1, inputs.tubelet_size)
        if self.masks_times and times < 2:
            got = f"{self.key!r} on clips of {times} temporal position"
            allowed = "clips of 2 or more (num_frames / tubelet_size)"
            yield Misfit(("kind",), got, allowed, "raise model.num_frames")

    @property
    def pupils(self) -> tuple[Pupil, ...]:
        """A codebook that was trained."""
        return pupils_of(self.codebook)

    def rows(self, batch_size: int) -> range:
        """Indices of the samples that get a masked pass."""
        return range(self.offset, batch_size, self.every)

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A masked pass over ``rows``; the momentum twins if they give the targets."""
        count = len(self.rows(batch_size))
        if visual_of(kind) != ("clip" if self.on_videos else "image") or count == 0:
            return None
        return Demands(rows={"visual": {self.key: count}}, reads=visual_target_fields(self.targets))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws ``{key}/rows`` int64 ``[M]``, ``/mask`` bool ``[M, T, N]`` and ``/masked``; see ``prepared_mask``."""
        times = max(1, batch.num_frames // context.tubelet_size)
        rows = self.rows(batch.size)
        streams, grids, places = context.streams(self.key), context.grids(batch), context.places(batch)
        positions = batch.position.tolist()
        masks = [in_places(self.mask(streams.at(positions[i]), times, grids[i]), places) for i in rows]
        return prepared_mask(self.key, torch.tensor(list(rows), dtype=torch.int64), torch.from_numpy(np.stack(masks)))

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """The map from features of masked patches to their targets."""
        tubelet_size = sizes.tubelet_size if self.on_videos else 1
        return patch_head(sizes, "visual", self.targets, tubelet_size, self.codebook)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The masked patches."""
        return {self.key: state[f"{self.key}/mask"].sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean distance over all values of masked patches, or mean cross-entropy of their codes."""
        assert isinstance(heads.own, PatchHead)
        mask = state[f"{self.key}/mask"]
        features = state.rows("visual", self.key)
        distances = patch_distances(state, self.key, features, heads.own, self.targets, self.feature_loss)
        count = mask.sum()
        loss = replica_mean(distances.sum(), count, gather, state.term_weight(self.key))
        return ObjectiveLoss(loss, {"masked_fraction": count.float() / self._num_patches(state)})

    def _num_patches(self, state: State) -> Tensor | int:
        """Patches of the masked rows, padding left out."""
        mask = state[f"{self.key}/mask"]
        if "grids" not in state:
            return mask.numel()
        return mask.shape[1] * state["grids"][state[f"{self.key}/rows"]].prod(1).sum()


def prepared_mask(segment: str, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a masked visual pass needs, as ``{segment}/...``: its rows, their masks, and where they are masked.

    To be called in a data worker: how many patches are masked is then known without waiting for a device.

    Args:
        segment: Name of the pass.
        rows: int64 ``[M]``, the samples of the batch.
        mask: Bool ``[M, ...]``.

    Returns:
        ``rows`` and ``mask``, and ``masked``, int64 ``[K]``: the masked patches, counted over all rows.
    """
    return {f"{segment}/rows": rows, f"{segment}/mask": mask, f"{segment}/masked": mask.flatten().nonzero()[:, 0]}


def visual_target_fields(targets: VisualTargets) -> frozenset[str]:
    """The fields, besides pixels, that targets of masked patches are computed from."""
    return frozenset({"momentum_visual"}) if targets == "momentum" else frozenset()


class PatchHead(Head):
    """One linear map, as in SimMIM (Xie et al., arXiv 2111.09886); or scores of codes."""

    def __init__(
        self,
        hidden_size: int,
        outputs: int,
        patch_size: int,
        tubelet_size: int,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.output = Linear(hidden_size, outputs) if codebook is None else None
        self.codes = None if codebook is None else CodeHead(hidden_size, codebook, outputs)

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of a tokenizer that says which codes are right."""
        taught = None if self.codes is None else self.codes.codebook
        return taught.flops(layout, backward) if isinstance(taught, TrainedCodes) else 0.0

    def forward(self, features: Tensor) -> Tensor:
        """Maps ``[K, D]`` to ``[K, C]`` (pixels) or ``[K, D]`` (features), in the dtype of the input."""
        assert self.output is not None, "targets are codes"
        predicted: Tensor = self.output(features)
        return predicted


def patch_head(
    sizes: HeadSizes,
    stream: str,
    targets: VisualTargets,
    tubelet_size: int,
    codebook: Codebook | None = None,
) -> PatchHead:
    """The head from features of masked patches in a stream to their targets, or to the codes of these."""
    width = sizes.widths[stream]
    outputs = sizes.patch_size**2 * 3 * tubelet_size if targets == "pixels" else sizes.widths["visual"]
    return PatchHead(width, outputs, sizes.patch_size, tubelet_size, codebook)


def patch_distances(
    state: State,
    segment: str,
    features: Tensor,
    head: PatchHead,
    targets: VisualTargets,
    feature_loss: FeatureLoss,
) -> Tensor:
    """Distances between the predictions of a masked visual pass and their targets.

    Args:
        state: Has ``{segment}/rows`` and ``/masked``, and ``frames`` or ``momentum_visual``.
        segment: Name of the pass.
        features: The pass's output for the segment's rows, ``[M, S, D]``.
        head: Maps features to targets.
        targets: See ``MaskedVisual``.
        feature_loss: Distance to momentum targets.

    Returns:
        fp32 ``[K]``, a mean over the values of each masked patch, or the cross-entropy of its code.
    """
    rows, chosen = state[f"{segment}/rows"], state[f"{segment}/masked"]
    if head.codes is not None and isinstance(head.codes.codebook, TrainedCodes):
        return head.codes.distances(features[:, 1:], chosen, head.codes.codebook(state, rows, chosen))
    if head.codes is not None:
        if targets == "pixels":
            patches = pixels_of(state["frames"][rows], chosen, head.patch_size, head.tubelet_size) * 2.0 - 1.0
        else:
            patches = feature_targets(state["momentum_visual"][rows], chosen)
        return head.codes.distances(features[:, 1:], chosen, head.codes.codebook(patches))
    predicted = head(selected(features[:, 1:], chosen)).float()
    if targets == "pixels":
        wanted = pixel_targets(state["frames"][rows], chosen, head.patch_size, head.tubelet_size)
        per_patch: Tensor = (predicted - wanted).square().mean(-1)
        return per_patch
    return feature_distance(predicted, feature_targets(state["momentum_visual"][rows], chosen), feature_loss)


def patchify(frames: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Cuts frames into patches.

    Args:
        frames: ``[M, F, 3, H, W]``; F is a multiple of ``tubelet_size``.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per patch.

    Returns:
        ``[M, T, N, C]`` with T = F / tubelet_size; patches row by row, a patch laid out (frame, colour, row, column).
    """
    patches = unfold(frames, patch_size)
    count, num_frames, num_patches, values = patches.shape
    tubelets = patches.reshape(count, num_frames // tubelet_size, tubelet_size, num_patches, values)
    return tubelets.transpose(2, 3).flatten(3)


def pixel_targets(frames: Tensor, chosen: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Values of masked patches, each patch shifted and scaled to mean 0 and variance 1 over all its values.

    Args:
        frames: uint8 ``[M, F, 3, H, W]``.
        chosen: int64 ``[K]``, masked patches, counted over all rows.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per patch.

    Returns:
        fp32 ``[K, C]``.

    Source: He et al., MAE, arXiv 2111.06377, section 4.1 ("normalized pixels"); unbiased variance and eps 1e-6 as in
        its code.
    """
    values = pixels_of(frames, chosen, patch_size, tubelet_size)
    return (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + PIXEL_EPS).sqrt()


def pixels_of(frames: Tensor, chosen: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Values of masked patches from 0 to 1, fp32 ``[K, C]``; see ``pixel_targets``."""
    return patchify(frames, patch_size, tubelet_size).flatten(0, 2)[chosen].float() / 255.0


def feature_targets(momentum_visual: Tensor, chosen: Tensor) -> Tensor:
    """The momentum encoder's features of masked patches, computed from the whole sample.

    They are normalised without learnt scale, as in data2vec (Baevski et al., arXiv 2202.03555, section 3.3): otherwise
    features could collapse to a constant, which is easy to predict.

    Args:
        momentum_visual: ``[M, S, D]``.
        chosen: int64 ``[K]``, masked patches, counted over all rows.

    Returns:
        fp32 ``[K, D]``, no gradient.
    """
    features = selected(momentum_visual.detach()[:, 1:], chosen).float()
    return F.layer_norm(features, features.shape[-1:])


def feature_distance(predicted: Tensor, targets: Tensor, kind: FeatureLoss) -> Tensor:
    """Distance per patch, ``[K]``: mean smooth L1 (beta 1) over the features, or 1 - cosine."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predicted, targets, reduction="none").mean(-1)
    return 1.0 - F.cosine_similarity(predicted, targets, dim=-1)

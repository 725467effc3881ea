"""Masked data modelling: masked images alone, masked texts alone, and pairs with both sides masked.

Shapes: B samples, L text positions, N patches of an image.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from omnivl.chain.demands import VOCABULARY, Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.positions import chosen_of, prepared_targets
from omnivl.chain.preparation import join_draws
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, has_text, is_label, visual_of
from omnivl.objectives.codes import Codebook, pupils_of
from omnivl.objectives.masked_visual import (
    FeatureLoss,
    PatchHead,
    VisualTargets,
    patch_distances,
    patch_head,
    prepared_mask,
    visual_target_fields,
)
from omnivl.objectives.masking import block_mask, in_places
from omnivl.objectives.mlm import MLM
from omnivl.objectives.teacher import Pupil
from omnivl.objectives.vocabulary import num_targets, token_loss


@dataclass(frozen=True)
class MDM(Objective):
    """BEiT-3's only objective: masked parts of images, texts and pairs are restored from the rest.

    An image with a caption gives one row of each part (image, text, pair), so that the parts are equally large. An
    image with a class label or without a text gives the image part only, a text without an image the text part only.
    Needs an architecture with the stream ``fused_visual``, since patches of a pair are restored from joined rows.

    Attributes:
        image_probability: Share of patches to mask of images, alone and in pairs.
        text_probability: Share of ordinary tokens to predict of texts alone.
        pair_text_probability: Share of ordinary tokens to predict of texts in pairs.
        image_weight: Factor of the loss on images alone, at the masked patches.
        text_weight: Factor of the loss on texts alone, at the masked tokens.
        pair_weight: Factor of the loss on pairs: its sum over masked tokens and masked patches.
        min_block: Smallest area that is drawn for a masked rectangle, in patches; see ``block_mask``.
        mask_share: Share of the tokens to predict that [MASK] replaces.
        random_share: Share of them that a random ordinary token replaces; the rest stays as it is.
        targets: ``pixels``: a patch's own values, normalised per patch. ``momentum``: the momentum twin's features of
            the patch, computed from the whole image; needs the model's momentum twins.
        feature_loss: Distance to momentum targets.
        codebook: Makes classes of the targets, as in the paper; see ``MaskedVisual``. Null restores the targets.

    Source: Wang et al., BEiT-3, arXiv 2208.10442, section 2.2 (the three shares of masked positions, block-wise on
        images; a third of each batch for each part).
    Differs: patches are restored as pixels, features or codes; the paper's codes are of BEiT v2's tokenizer, which
        learns to restore features. Images and texts alone are the sides of the pairs, and images with labels; the
        paper's come from other data sets.
    """

    kind: Literal["mdm"] = "mdm"
    image_probability: float = 0.4
    text_probability: float = 0.15
    pair_text_probability: float = 0.5
    image_weight: float = 1.0
    text_weight: float = 1.0
    pair_weight: float = 1.0
    min_block: int = 4
    mask_share: float = 0.8
    random_share: float = 0.1
    targets: VisualTargets = "pixels"
    feature_loss: FeatureLoss = "smooth_l1"
    codebook: Codebook | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 < self.image_probability < 1.0, "image_probability", "above 0 and below 1")
        for option in ("text_probability", "pair_text_probability"):
            self.require(0.0 < getattr(self, option) <= 1.0, option, "above 0 and at most 1")
        for option in ("image_weight", "text_weight", "pair_weight"):
            self.require(getattr(self, option) > 0.0, option, "above 0")
        self.require(self.min_block >= 1, "min_block", "at least 1")
        self.require(0.0 <= self.mask_share <= 1.0, "mask_share", "from 0 to 1")
        most = 1.0 - self.mask_share
        self.require(0.0 <= self.random_share <= most + 1e-9, "random_share", f"from 0 to 1 - mask_share = {most:g}")

    @property
    def pupils(self) -> tuple[Pupil, ...]:
        """A codebook that was trained."""
        return pupils_of(self.codebook)

    @property
    def parts(self) -> tuple[str, str, str]:
        """Names of a step's rows: the image alone, the text alone, and both in one sequence."""
        return f"{self.key}/image", f"{self.key}/text", f"{self.key}/pair"

    @property
    def restored_words(self) -> dict[str, float]:
        """The shares of hidden tokens."""
        _, text, pair = self.parts
        return {text: self.text_probability, pair: self.pair_text_probability}

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A row of each part per pair; for an image with a label or without a text, the image alone."""
        image, text, pair = self.parts
        fields = visual_target_fields(self.targets)
        if kind == "text":
            return Demands(rows={"text": {text: batch_size}}, reads=frozenset({VOCABULARY}))
        if visual_of(kind) != "image":
            return None
        if is_label(kind) or not has_text(kind):
            return Demands(rows={"visual": {image: batch_size}}, reads=fields)
        return Demands(
            rows={"visual": {image: batch_size, pair: batch_size}, "text": {text: batch_size, pair: batch_size}},
            joins={pair: Join(text=pair, sees=pair)},
            reads=fields | {"fused_visual", VOCABULARY},
        )

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws the masks of each part.

        ``{key}/image`` and ``{key}/pair`` get ``/rows`` int64 ``[B]``, ``/mask`` bool ``[B, 1, N]`` and ``/masked``;
        ``{key}/text`` and ``{key}/pair`` get ``/token_ids`` and ``/targets`` int64 ``[B, L]``.
        """
        image, text, pair = self.parts
        if batch.kind == "text":
            return self._hide_tokens(text, self.text_probability, batch, context)
        alone = self._hide_patches(image, batch, context)
        if is_label(batch.kind) or not has_text(batch.kind):
            return alone
        return join_draws(
            alone,
            self._hide_patches(pair, batch, context),
            self._hide_tokens(text, self.text_probability, batch, context),
            self._hide_tokens(pair, self.pair_text_probability, batch, context),
        )

    def _hide_patches(self, segment: str, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        streams, options = context.streams(f"{segment}/mask"), (self.image_probability, self.min_block)
        masks = [
            in_places(block_mask(streams.at(position), grid, *options).reshape(1, -1), context.places(batch))
            for position, grid in zip(batch.position.tolist(), context.grids(batch), strict=True)
        ]
        return prepared_mask(segment, torch.arange(batch.size), torch.from_numpy(np.stack(masks)))

    def _hide_tokens(
        self, segment: str, probability: float, batch: Batch, context: PrepareContext
    ) -> dict[str, Tensor]:
        words = MLM(probability=probability, mask_share=self.mask_share, random_share=self.random_share)
        token_ids, targets = words.hide_all(f"{segment}/token_ids", batch, context)
        return {f"{segment}/token_ids": token_ids, **prepared_targets(segment, targets)}

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """The map from features of masked patches to their targets; words have the vocabulary head."""
        return patch_head(sizes, "fused", self.targets, 1, self.codebook)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """Masked patches and hidden tokens of each part, by ``{part}/patches`` and ``{part}/words``."""
        words = {
            f"{part}/words": num_targets(state[f"{part}/targets"]) for part in self.parts if f"{part}/targets" in state
        }
        patches = {f"{part}/patches": state[f"{part}/mask"].sum() for part in self.parts if f"{part}/mask" in state}
        return words | patches

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The weighted sum of the parts' losses, each a mean over masked patches or tokens."""
        image, text, pair = self.parts
        if image not in state.layout.visual:
            written = self._words(state, text, "text", heads, gather)
            metrics = {"text": written.loss.detach(), "text_accuracy": written.metrics["accuracy"]}
            return ObjectiveLoss(self.text_weight * written.loss, metrics)
        alone = self._patches(state, image, "visual", heads, gather)
        total, metrics = self.image_weight * alone, {"image": alone.detach()}
        if pair in state.layout.fused:
            written = self._words(state, text, "text", heads, gather)
            words = self._words(state, pair, "fused", heads, gather)
            patches = self._patches(state, pair, "fused_visual", heads, gather)
            total = total + self.text_weight * written.loss + self.pair_weight * (words.loss + patches)
            metrics |= {"text": written.loss, "pair_text": words.loss, "pair_image": patches}
            metrics |= {"text_accuracy": written.metrics["accuracy"], "pair_text_accuracy": words.metrics["accuracy"]}
        return ObjectiveLoss(total, metrics)

    def _words(self, state: State, segment: str, stream: str, heads: Heads, gather: Gather) -> ObjectiveLoss:
        weight = state.term_weight(f"{segment}/words")
        hidden, targets = state.rows(stream, segment), state[f"{segment}/targets"]
        chosen = chosen_of(state, segment)
        return token_loss(hidden, targets, heads.vocabulary, gather, term_weight=weight, chosen=chosen)

    def _patches(self, state: State, segment: str, stream: str, heads: Heads, gather: Gather) -> Tensor:
        assert isinstance(heads.own, PatchHead)
        features = state.rows(stream, segment)
        distances = patch_distances(state, segment, features, heads.own, self.targets, self.feature_loss)
        weight = state.term_weight(f"{segment}/patches")
        return replica_mean(distances.sum(), state[f"{segment}/mask"].sum(), gather, weight)

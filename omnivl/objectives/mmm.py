"""Masked multimodal modelling: pairs masked on both sides, some of them with another sample's text.

Shapes: B samples of this replica, K samples that texts are drawn from (B, or all replicas' samples), L text positions,
N patches of an image, D width of the fused rows.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.backward import Backward
from omnivl.chain.demands import Demands, Join
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Drawn, Head, Heads, Objective, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.positions import IGNORED, chosen_of, prepared_targets
from omnivl.chain.preparation import join_draws
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch, DataKind, is_label, is_pair, visual_of
from omnivl.objectives.codes import Codebook, RandomCodebook, pupils_of
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
from omnivl.objectives.vlm import MatchHead, draw_negatives
from omnivl.objectives.vocabulary import num_targets, token_loss
from omnivl.parts.heads import VocabularyHead


@dataclass(frozen=True)
class MMM(Objective):
    """FLAVA's objective on pairs: masked words, masked patches, and whether the two belong together.

    A sample gives one fused row of its masked image and a masked text, which is another sample's with the probability
    ``replaced``. All rows are matched; words and patches are restored in rows with the own text only. Each of the three
    has a head of its own. Needs an architecture with the streams ``masked_visual`` and ``fused_visual``.

    Attributes:
        probability: Share of ordinary tokens to predict.
        mask_share: Share of these that [MASK] replaces.
        random_share: Share of these that a random ordinary token replaces; the rest stays as it is.
        whole_words: Whether all tokens of a word are predicted together; see ``MLM``.
        image_probability: Share of patches to mask.
        min_block: Smallest area that is drawn for a masked rectangle, in patches; see ``block_mask``.
        replaced: Probability that a sample gets another text; 0 matches nothing.
        negatives: Whether these are texts of this replica's samples (``local``) or of all replicas' (``global``: the
            result does not depend on the number of replicas).
        text_weight: Factor of the loss on words.
        image_weight: Factor of the loss on patches.
        match_weight: Factor of the loss of matching.
        targets: What is restored of patches; see ``MaskedVisual``.
        feature_loss: Distance to momentum targets.
        codebook: Makes classes of the targets; see ``MaskedVisual``.

    Source: Singh et al., FLAVA, arXiv 2112.04482, section 3.2, and the released code: 75 of 196 patches, masked words
        and patches of mismatched pairs left out of the losses, a tenth of the pairs mismatched.
    Differs: codes are those of ``codebook``, there those of DALL-E's tokenizer. Other texts come from the batch, there
        from the data set; here mismatched pairs are made for this loss alone, there the contrast leaves their rows out.
        Where no pair of a step matches, nothing is restored; there all pairs are then.
    """

    kind: Literal["mmm"] = "mmm"
    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False
    image_probability: float = 75 / 196
    min_block: int = 16
    replaced: float = 0.1
    negatives: Literal["local", "global"] = "local"
    text_weight: float = 1.0
    image_weight: float = 1.0
    match_weight: float = 1.0
    targets: VisualTargets = "pixels"
    feature_loss: FeatureLoss = "smooth_l1"
    codebook: Codebook | None = field(default_factory=RandomCodebook)

    compares_samples: ClassVar[bool] = True
    scores_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 < self.probability <= 1.0, "probability", "above 0 and at most 1")
        self.require(0.0 <= self.mask_share <= 1.0, "mask_share", "from 0 to 1")
        most = 1.0 - self.mask_share
        self.require(0.0 <= self.random_share <= most + 1e-9, "random_share", f"from 0 to 1 - mask_share = {most:g}")
        self.require(0.0 < self.image_probability < 1.0, "image_probability", "above 0 and below 1")
        self.require(self.min_block >= 1, "min_block", "at least 1")
        self.require(0.0 <= self.replaced < 1.0, "replaced", "at least 0 and below 1")
        for option in ("text_weight", "image_weight", "match_weight"):
            self.require(getattr(self, option) >= 0.0, option, "at least 0")

    @property
    def needs_whole_texts(self) -> bool:
        """Those of other replicas are joined with these images."""
        return self.negatives == "global"

    @property
    def restored_words(self) -> dict[str, float]:
        """The share of hidden tokens."""
        return {self.key: self.probability}

    @property
    def pupils(self) -> tuple[Pupil, ...]:
        """A codebook that was trained."""
        return pupils_of(self.codebook)

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A masked image, a masked text and a fused row per sample, on images with captions."""
        if not is_pair(kind) or is_label(kind) or visual_of(kind) != "image":
            return None
        drawn: Literal["text"] | None = "text" if self.replaced > 0.0 else None
        return Demands(
            rows={"visual": {self.key: batch_size}, "text": {self.key: batch_size}},
            joins={self.key: Join(text=self.key, sees=self.key, drawn=drawn)},
            reads=frozenset({"fused_visual", *visual_target_fields(self.targets)})
            | ({"pooled"} if self.replaced > 0.0 else frozenset()),
        )

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws masks of patches and words, and which texts are replaced.

        ``{key}/rows`` int64 ``[B]``, ``/mask`` bool ``[B, 1, N]``, ``/masked``; ``/token_ids`` and ``/targets`` int64
        ``[B, L]``; ``/uniforms`` fp32 ``[B, 2]``: whether the text is replaced, and by which.
        """
        streams = context.streams(f"{self.key}/mask")
        masks = [
            in_places(
                block_mask(streams.at(position), grid, self.image_probability, self.min_block).reshape(1, -1),
                context.places(batch),
            )
            for position, grid in zip(batch.position.tolist(), context.grids(batch), strict=True)
        ]
        words = MLM(
            probability=self.probability,
            mask_share=self.mask_share,
            random_share=self.random_share,
            whole_words=self.whole_words,
        )
        token_ids, targets = words.hide_all(f"{self.key}/token_ids", batch, context)
        draws = context.uniforms(f"{self.key}/text", batch, 2).astype(np.float32)
        return join_draws(
            prepared_mask(self.key, torch.arange(batch.size), torch.from_numpy(np.stack(masks))),
            {f"{self.key}/token_ids": token_ids, **prepared_targets(self.key, targets)},
            # Rounding to fp32 may give 1, which is outside [0, 1).
            {f"{self.key}/uniforms": torch.from_numpy(np.minimum(draws, np.float32(1 - 2**-24)))},
        )

    def _world(self, gather: Gather) -> Gather:
        """The replicas whose texts are candidates."""
        return gather if self.negatives == "global" else LocalGather()

    def _admissible(self, state: State, gather: Gather) -> Tensor:
        """Bool ``[B, K]``, candidates in replica order: those of another identity."""
        return state["identity"][:, None] != self._world(gather).join(state["identity"])

    def _matches(self, state: State, admissible: Tensor) -> Tensor:
        """Bool ``[B]``: which rows keep their own text."""
        if self.replaced == 0.0:
            return torch.ones(len(admissible), dtype=torch.bool, device=admissible.device)
        return (state[f"{self.key}/uniforms"][:, 0] >= self.replaced) | ~admissible.any(-1)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """Hidden tokens and masked patches of the rows that keep their text."""
        matches = self._matches(state, self._admissible(state, gather))
        return {
            f"{self.key}/words": num_targets(self._targets(state, matches)),
            f"{self.key}/patches": (state[f"{self.key}/mask"].flatten(1).sum(1) * matches).sum(),
        }

    def _targets(self, state: State, matches: Tensor) -> Tensor:
        return state[f"{self.key}/targets"].masked_fill(~matches[:, None], IGNORED)

    def draw(self, state: State, gather: Gather) -> Drawn:
        """Draws texts evenly; adds ``{key}/matches`` bool ``[B]``."""
        admissible, world = self._admissible(state, gather), self._world(gather)
        evenly = torch.zeros(admissible.shape, device=admissible.device)
        other = draw_negatives(evenly, admissible, state[f"{self.key}/uniforms"][:, 1], 0.0)
        # Drawn in replica order, then converted to indices with own rows first: the draw equals that of the joined
        # batch.
        other = (other - world.replica * len(admissible)) % admissible.shape[1]
        matches = self._matches(state, admissible)
        own = torch.arange(len(matches), device=matches.device)
        leaves = {f"{self.key}/matches": matches}
        return Drawn({self.key: torch.where(matches, own, other)}, self.negatives == "global", leaves)

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Three heads: of words, patches and the match."""
        return MMMHead(sizes, self.targets, self.codebook, matches=self.replaced > 0.0)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The weighted sum of means over hidden words, over masked patches and over rows."""
        assert isinstance(heads.own, MMMHead)
        matches = (
            state[f"{self.key}/matches"] if self.replaced > 0.0 else self._matches(state, state["identity"][:, None])
        )
        words = token_loss(
            *(state.rows("fused", self.key), self._targets(state, matches), heads.own.words, gather),
            term_weight=state.term_weight(f"{self.key}/words"),
            chosen=chosen_of(state, self.key),
        )
        seen = state.rows("fused_visual", self.key)
        distances = patch_distances(state, self.key, seen, heads.own.patches, self.targets, self.feature_loss)
        kept = matches.float()[state[f"{self.key}/masked"] // state[f"{self.key}/mask"].flatten(1).shape[1]]
        term_weight = state.term_weight(f"{self.key}/patches")
        patches = replica_mean((distances * kept).sum(), kept.sum(), gather, term_weight)
        total = self.text_weight * words.loss + self.image_weight * patches
        metrics = {"text": words.loss.detach(), "text_accuracy": words.metrics["accuracy"], "image": patches.detach()}
        if heads.own.match is not None:
            logits = heads.own.match(state.pooled(self.key))
            match = F.cross_entropy(logits, matches.long())
            total = total + self.match_weight * match
            right = (logits.argmax(-1) == matches).float().mean()
            metrics |= {"match": match.detach(), "match_accuracy": right, "matches": matches.float().mean()}
        return ObjectiveLoss(total, metrics)

    def asks(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per text, unmasked; nothing where no head matches."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled"})) if self.replaced > 0.0 else None

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Log odds of "match" for each fused row, fp32 ``[R]``."""
        assert isinstance(heads.own, MMMHead)
        assert heads.own.match is not None
        logits = heads.own.match(state.pooled(self.key))
        odds: Tensor = logits[:, 1] - logits[:, 0]
        return odds


class MMMHead(Head):
    """Scores of words, predictions of patches or scores of their codes, and scores of "no match" and "match"."""

    def __init__(self, sizes: HeadSizes, targets: VisualTargets, codebook: Codebook | None, *, matches: bool) -> None:
        super().__init__()
        self.words = VocabularyHead(sizes.widths["fused"], sizes.vocab_size)
        self.patches: PatchHead = patch_head(sizes, "fused", targets, 1, codebook)
        self.match = MatchHead(sizes.pooled) if matches else None

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of a tokenizer of patches."""
        return self.patches.flops(layout, backward)

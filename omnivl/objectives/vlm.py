"""Visual-language matching: does this text belong to this image or clip?

Shapes: B samples of this replica, R rows of its regions, K candidates for negatives (B or R, of this replica or of
all), D hidden size.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import EMBEDDINGS, REGION_EMBEDDINGS, TWIN, Demands, Join
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Drawn, Heads, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, is_label, is_pair
from omnivl.objectives.regions import RegionObjective
from omnivl.parts.heads import Perceptron
from omnivl.parts.linear import Linear
from omnivl.parts.similarity import similarity

SEGMENTS = ("positive", "negative_visual", "negative_text")
"""Fused rows: own text and own visual; own text and another's visual; another's text and own visual."""

Probabilities = Literal["negatives", "all"]


@dataclass(frozen=True)
class VLM(RegionObjective):
    """Binary matching with hard negatives drawn from the contrastive similarities.

    Attributes:
        negatives: Whether negatives come from this replica's samples (``local``) or from those of all replicas
            (``global``: joins visual and text features; the result does not depend on the number of replicas).
        epsilon: Added to the probability of every admissible negative before drawing.
        probabilities: Over which candidates the softmax of a sample's similarities runs: ``negatives``, the admissible
            ones, whose probabilities add up to 1 before ``epsilon``; or ``all``, the sample's own pair included, which
            is left out after ``epsilon`` was added. With ``all``, negatives are drawn the more evenly the surer the
            model is of the own pair.
        similarities: What a sample's embedding is compared with: the ``online`` embeddings of the others, or their
            ``momentum`` ones, which need the model's momentum twins.
        include_labels: Whether class prompts are matched too.
        head: ``linear``, or the ``perceptron`` of X-VLM: as in the objective ``locate``.

    Source: Li et al., ALBEF, arXiv 2107.07651, section 3.2; Li et al., BLIP, arXiv 2201.12086 (epsilon 1e-4). The code
        of both takes ``probabilities: all`` and ``similarities: momentum`` in pretraining; BLIP's adds the epsilon.
    Differs: pairs of equal identity are never negatives, and a sample without admissible negatives contributes its
        positive pair only (ALBEF's sampling becomes NaN, its issue 107).
    """

    kind: Literal["vlm"] = "vlm"
    negatives: Literal["local", "global"] = "local"
    epsilon: float = 1e-4
    probabilities: Probabilities = "negatives"
    similarities: Literal["online", "momentum"] = "online"
    include_labels: bool = False
    head: Literal["linear", "perceptron"] = "linear"

    compares_samples: ClassVar[bool] = True
    scores_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.epsilon >= 0.0, "epsilon", "at least 0")
        self.require(self.similarities == "online" or not self.regions, "similarities", "'online' with regions")

    @property
    def needs_whole_texts(self) -> bool:
        """Those of other replicas are joined with these, or those of regions are texts of their own."""
        return self.negatives == "global" or super().needs_whole_texts

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Three fused rows per pair, and the embeddings to draw negatives by."""
        if not is_pair(kind) or (is_label(kind) and not self.include_labels) or not self.takes(kind):
            return None
        drawn: tuple[Literal["text", "sees"] | None, ...] = (None, "sees", "text")
        joins = {
            name: Join(self.pairs, self.pairs, drawn=side) for name, side in zip(self.segments, drawn, strict=True)
        }
        reads = frozenset({"pooled"})
        keys = tuple(TWIN + name for name in EMBEDDINGS) if self.similarities == "momentum" else ()
        draws_from = frozenset((*self._embeddings, "logit_scale", *keys))
        return Demands(joins=joins, reads=reads, draws_from=draws_from, regions=self.regions)

    @property
    def _embeddings(self) -> tuple[str, ...]:
        return REGION_EMBEDDINGS if self.regions else EMBEDDINGS

    def after_training(self) -> Self:
        """The same without momentum embeddings: nothing is drawn after training."""
        return replace(self.apart(), similarities="online")

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per text."""
        return Demands(joins={self.segments[0]: Join()}, reads=frozenset({"pooled"}))

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the fused rows: positive pairs, those with another visual, those with another text."""
        return tuple(f"{self.key}/{segment}" for segment in SEGMENTS)

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws ``{key}/uniforms`` fp32 ``[B, 2]``, or ``[R, 2]``: for the negative visual and the negative text."""
        rows = self.num_pairs(batch.size)
        draws = context.uniforms(self.key, batch, 2 * rows // batch.size).astype(np.float32).reshape(rows, 2)
        # Rounding to fp32 may give 1, which is outside [0, 1).
        return {f"{self.key}/uniforms": torch.from_numpy(np.minimum(draws, np.float32(1 - 2**-24)))}

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The positive pairs and the admissible negative ones."""
        admissible, present = self._admissible(state, gather), self.present(state)
        has_negative = admissible.any(-1)
        if present is None:
            return {self.key: len(admissible) + 2 * has_negative.sum()}
        return {self.key: present.sum() + 2 * (has_negative & present).sum()}

    def _world(self, gather: Gather) -> Gather:
        """The replicas whose samples are candidates."""
        return gather if self.negatives == "global" else LocalGather()

    def _admissible(self, state: State, gather: Gather) -> Tensor:
        """Which candidates may be negatives of a pair, bool ``[B, K]``, or ``[R, K]``."""
        identity, present, world = self.identity_of(state), self.present(state), self._world(gather)
        differs = identity[:, None] != world.join(identity)
        return differs if present is None else differs & world.join(present)

    def draw(self, state: State, gather: Gather) -> Drawn:
        """Draws hard negatives by the similarities; adds ``{key}/has_negative`` bool ``[B]``, or ``[R]``."""
        visual, text = (state[name] for name in self._embeddings)
        # Drawn in replica order, then converted to indices with own rows first: the draw equals that of the joined
        # batch.
        world = self._world(gather)
        admissible = self._admissible(state, gather)
        uniforms, scale = state[f"{self.key}/uniforms"], state["logit_scale"]
        twin = TWIN if self.similarities == "momentum" else ""
        visual_keys, text_keys = (world.join(state[twin + name].detach()) for name in self._embeddings)
        logits = scale * torch.stack([similarity(text, visual_keys), similarity(visual, text_keys)])
        drawn = draw_negatives(logits, admissible, uniforms.t(), self.epsilon, self.probabilities)
        rows = ((drawn - world.replica * len(admissible)) % admissible.shape[1]).unbind()
        leaves = {f"{self.key}/has_negative": admissible.any(-1)}
        return Drawn(dict(zip(self.segments[1:], rows, strict=True)), self.negatives == "global", leaves)

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Two scores, no match and match, from a pooled fused row."""
        return MatchHead(sizes.pooled) if self.head == "linear" else Perceptron(sizes.pooled, 2)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean two-way cross-entropy over positive pairs and admissible negative ones."""
        head = heads.own
        assert isinstance(head, MatchHead | Perceptron)
        logits = head(state.pooled(*self.segments))
        has_negative, present = state[f"{self.key}/has_negative"].float(), self.present(state)
        weights = has_negative.repeat(len(self.segments))
        weights[: len(has_negative)].fill_(1.0)
        if present is not None:
            weights = weights * present.repeat(len(self.segments))
        targets = torch.zeros(len(weights), dtype=torch.int64, device=logits.device)
        targets[: len(has_negative)].fill_(1)
        total = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        count = weights.sum()
        with torch.no_grad():
            right = ((logits.argmax(-1) == targets) * weights).sum()
            if present is None:
                accuracy = right / count
            else:  # replicas differ in their number of pairs
                accuracy = replica_mean(right, count, gather, state.term_weight(self.key))
            metrics = {"accuracy": accuracy, "with_negative": has_negative.mean()}
        return ObjectiveLoss(replica_mean(total, count, gather, state.term_weight(self.key)), metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Log odds of "match" for each fused row, fp32 ``[R]``."""
        assert isinstance(heads.own, MatchHead | Perceptron)
        logits = heads.own(state.pooled(self.segments[0]))
        odds: Tensor = logits[:, 1] - logits[:, 0]
        return odds


class MatchHead(nn.Module):
    """Scores of "no match" and "match"."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.output = Linear(hidden_size, 2)

    def forward(self, row: Tensor) -> Tensor:
        """fp32 ``[R, 2]`` from pooled rows ``[R, D]``."""
        logits: Tensor = self.output(row).float()
        return logits


@torch.no_grad()
def draw_negatives(
    logits: Tensor, admissible: Tensor, uniforms: Tensor, epsilon: float, probabilities: Probabilities = "negatives"
) -> Tensor:
    """Draws one candidate per row by the inverse of the cumulative softmax.

    Args:
        logits: Similarities over temperature ``[..., B, K]``.
        admissible: Bool ``[B, K]``; others are never drawn.
        uniforms: fp32 ``[..., B]`` in [0, 1).
        epsilon: Added to the probability of every admissible candidate.
        probabilities: See ``VLM``.

    Returns:
        int64 ``[..., B]``. A row without an admissible candidate gets 0; the caller has to leave it out.
    """
    compared = logits.float()
    if probabilities == "negatives":
        # Finite: the softmax of a row of minus infinity is NaN, which would spread through the sums below.
        compared = compared.masked_fill(~admissible, torch.finfo(torch.float32).min)
    weights = ((compared.softmax(-1) + epsilon) * admissible).double()
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    # Below the total in any rounding, so that no index after the last admissible candidate can result.
    threshold = torch.minimum(uniforms.double()[..., None] * total, total * (1.0 - 1e-12))
    return (cumulative <= threshold).sum(-1) % admissible.shape[-1]  # K where nothing is admissible

"""Prototypes that both modalities share: a sample's image and text are assigned to them.

Shapes: B samples of this replica, J joined batch (replicas * B), P projection size, K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.backward import Backward
from omnivl.chain.demands import EMBEDDINGS, TWIN, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, Objective, ObjectiveLoss
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DataKind, is_pair
from omnivl.objectives.optimal_transport import transport_plan
from omnivl.parts.linear import draw_normal
from omnivl.parts.quantize import perplexity


@dataclass(frozen=True)
class Prototypes(Objective):
    """Prototypes between the modalities, by which a sample's embedding predicts where its momentum twin's one goes.

    The momentum embeddings of a modality, over the joined batch, are moved to the prototypes at the least cost, all
    prototypes getting the same mass. The cost of that plan is one term of the loss, by which prototypes learn. A
    sample's row of the plan, as a distribution, is the target of the softmax of its own embedding's similarities with
    the prototypes; that cross-entropy is the other term, by which the encoders learn as well. All four terms, two of
    each modality, are added up.

    Attributes:
        num_prototypes: K.
        plan: Whose plan is the target of an image's (a text's) prediction: ``own``, the momentum images' (texts'), as
            algorithm 1 of the paper has it; ``cross``, that of the other modality, as its equation 2 has it for images.
        cost: Of moving to a prototype: ``distance``, 1 - cosine; ``similarity``, the cosine + 1, as algorithm 1 hands
            it on, by which mass goes where it is least alike.
        beta: Of the transport; see ``transport_plan``.
        iterations: Likewise.
        over: Samples that a plan moves together: ``joined``, those of all replicas, or ``local``, the replica's own.

    Source: Duan et al., CODIS, arXiv 2203.00048, section 3.2, equations 1 to 3 and algorithm 1.
    Differs: prototypes have unit length wherever they are compared. Rows of a plan are scaled to sum to 1 before they
        are targets. The temperature is the stage's. What the paper calls intra-cross alignment are the objectives
        ``univlc`` and ``intra_modal``, each of which halves two of its four terms. No architecture of its own: ALBEF's.
    """

    kind: Literal["prototypes"] = "prototypes"
    num_prototypes: Annotated[int, Range(2)] = 4000
    plan: Literal["own", "cross"] = "own"
    cost: Literal["distance", "similarity"] = "distance"
    beta: Annotated[float, Range(above=0.0)] = 0.5
    iterations: Annotated[int, Range(1)] = 50
    over: Literal["joined", "local"] = "joined"

    compares_samples: ClassVar[bool] = True

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Both embeddings and those of the twins, on all kinds of pairs."""
        if not is_pair(kind):
            return None
        return Demands(reads=frozenset((*EMBEDDINGS, *(TWIN + name for name in EMBEDDINGS), "logit_scale")))

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """The prototypes."""
        return PrototypesHead(self, sizes.projection_size)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The sum of both terms over both modalities.

        Metrics, of the joined batch or this replica's: ``transport``, the cost of both plans; ``prediction``, both
        cross-entropies; ``perplexity`` of the prototypes that get most of each sample.
        """
        head = heads.own
        assert isinstance(head, PrototypesHead)
        prototypes = F.normalize(head.prototypes.float(), dim=-1)
        moved = {name: self._moved(state[TWIN + name].detach().float(), prototypes, gather) for name in EMBEDDINGS}
        transport = torch.stack([cost for cost, _ in moved.values()]).sum()
        predictions = []
        for name, other in zip(EMBEDDINGS, reversed(EMBEDDINGS), strict=True):
            target = moved[name if self.plan == "own" else other][1]
            logits = state["logit_scale"] * state[name] @ prototypes.t()
            predictions.append(-(target * F.log_softmax(logits, dim=-1)).sum(-1).mean())
        prediction = torch.stack(predictions).sum()
        with torch.no_grad():
            chosen = torch.cat([target.argmax(-1) for _, target in moved.values()])
            used = perplexity(chosen, self.num_prototypes)
        metrics = {"transport": transport.detach(), "prediction": prediction.detach(), "perplexity": used}
        return ObjectiveLoss(transport + prediction, metrics)

    def _moved(self, embeddings: Tensor, prototypes: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        """The cost of moving embeddings to prototypes, and where each goes.

        Args:
            embeddings: fp32 ``[B, P]``, of unit length, without a gradient.
            prototypes: fp32 ``[K, P]``, likewise, with one.
            gather: Joins the replicas' embeddings.

        Returns:
            The cost, a scalar, the mean over replicas of which is that of the whole plan; and the rows of the plan
            ``[B, K]``, each of which sums to 1.
        """
        together = gather.join(embeddings) if self.over == "joined" else embeddings
        everywhere = (
            torch.ones(1, len(one), dtype=torch.bool, device=prototypes.device) for one in (together, prototypes)
        )
        plan = transport_plan(
            self._cost(together, prototypes.detach())[None], *everywhere, beta=self.beta, iterations=self.iterations
        )[0]
        first = gather.replica * len(embeddings) if self.over == "joined" else 0
        own = plan[first : first + len(embeddings)]
        shares = own / own.sum(-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
        parts = len(together) // len(embeddings)
        return parts * (own * self._cost(embeddings, prototypes)).sum(), shares

    def _cost(self, embeddings: Tensor, prototypes: Tensor) -> Tensor:
        cosines = embeddings @ prototypes.t()
        return 1.0 - cosines if self.cost == "distance" else 1.0 + cosines


class PrototypesHead(Head):
    """The prototypes, of which only directions count."""

    def __init__(self, config: Prototypes, size: int) -> None:
        super().__init__()
        self.iterations = config.iterations
        self.prototypes = nn.Parameter(torch.empty(config.num_prototypes, size))
        draw_normal(self.prototypes, std=size**-0.5)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The prototypes: their lengths mean nothing."""
        yield self.prototypes

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of products with prototypes and of the plans, for one replica's samples."""
        count, size = self.prototypes.shape
        compared = 2.0 * layout.batch_size * count * size
        # Of each modality: the prediction with both gradients; the plan's cost; the loss' cost with one gradient.
        products = 2.0 * (3.0 + 1.0 + 2.0) * compared
        return products + 2.0 * self.iterations * 2.0 * 2.0 * layout.batch_size * count

"""Local mutual information: a sample's embedding matches the parts of the same sample, its patches and its words.

Shapes: B samples of this replica, K samples that parts come from (B, or all replicas' samples), N patches of an image,
M parts of a sample, L text positions, P projection size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.demands import CLEAN, EMBEDDINGS, PARTS, TWIN, Demands
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss
from omnivl.chain.state import State
from omnivl.data.batch import DataKind, is_pair, visual_of
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit


@dataclass(frozen=True)
class LocalMI(Objective):
    """Embeddings of images and texts against the momentum model's parts of the same modality.

    Parts are projected as embeddings are. For each part p of its own a query q is told apart from the parts n of other
    samples: ``- log(exp(q . p / t) / (exp(q . p / t) + sum_n exp(q . n / t)))``. Terms are averaged over a sample's
    parts, then over samples, and halved over the two modalities. The temperature t is the stage's.

    Attributes:
        pool: Side of the squares of patches whose projections are averaged to one part, not normalised again.
        negatives: Whether other samples are this replica's (``local``) or those of all replicas (``global``: joins
            the parts; the result does not depend on the number of replicas).

    Source: Yang et al., TCL, arXiv 2202.10401 (local mutual information, LMI); pooling and terms as in its released
        code, in which parts of a text are all tokens behind the first, the end included.
    Differs: parts of samples of the query's identity are no negatives.
    """

    kind: Literal["local_mi"] = "local_mi"
    pool: int = 4
    negatives: Literal["local", "global"] = "local"

    compares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.pool >= 1, "pool", "at least 1")

    @property
    def needs_whole_texts(self) -> bool:
        """Words of other replicas are compared with these."""
        return self.negatives == "global"

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """Squares of patches that do not cut images evenly."""
        side = inputs.grid(False)[0]
        if side % self.pool:
            yield Misfit(
                ("pool",), str(self.pool), f"a divisor of {side}, the patches per side of an image", "change it"
            )
        if inputs.native:
            yield Misfit(
                ("kind",), f"{self.key!r} with model.sizes 'native'", "images of one size", "change model.sizes"
            )

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Both embeddings and the twins' parts, on images with a text."""
        if not is_pair(kind) or visual_of(kind) != "image":
            return None
        return Demands(reads=frozenset((*EMBEDDINGS, *(TWIN + name for name in PARTS), "logit_scale")))

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The mean over both modalities."""
        world = gather if self.negatives == "global" else LocalGather()
        patches, words = (state[TWIN + name] for name in PARTS)
        regions = pooled(patches, self.pool)
        told: dict[str, tuple[Tensor, Tensor]] = {
            "visual": (regions, torch.ones_like(regions[..., 0], dtype=torch.bool)),
            "text": (words, state[f"text_mask/{CLEAN}"][:, 1:]),
        }
        found = {
            modality: part_contrast(
                state[f"{modality}_embedding"], *parts, state["identity"], state["logit_scale"], world
            ).mean()
            for modality, parts in told.items()
        }
        metrics = {modality: one.detach() for modality, one in found.items()}
        return ObjectiveLoss((found["visual"] + found["text"]) / 2.0, metrics)


def pooled(patches: Tensor, side: int) -> Tensor:
    """Means over squares of ``side * side`` patches ``[B, N, P]`` of a square image, ``[B, N / side ** 2, P]``."""
    count, places, size = patches.shape
    across = isqrt(places) // side
    squares = patches.view(count, across, side, across, side, size)
    return squares.mean((2, 4)).flatten(1, 2)


def part_contrast(
    query: Tensor, parts: Tensor, valid: Tensor, identity: Tensor, scale: Tensor, gather: Gather
) -> Tensor:
    """The loss of each query, a mean over its parts, fp32 ``[B]``; see ``LocalMI``.

    Args:
        query: fp32 ``[B, P]``.
        parts: fp32 ``[B, M, P]``, no gradient.
        valid: Bool ``[B, M]``, which of them there are, at least one of each sample.
        identity: int64 ``[B]``.
        scale: 1 / temperature, fp32 scalar.
        gather: The replicas whose samples are negatives.
    """
    others, exist, named = (gather.join(one) for one in (parts, valid, identity))
    is_negative = (identity[:, None] != named)[..., None] & exist
    logits = (scale * query @ others.flatten(0, 1).t()).masked_fill(
        ~is_negative.flatten(1), torch.finfo(torch.float32).min
    )
    own = scale * (parts @ query[..., None])[..., 0]
    # log(exp(own) + exp(rest)) - own = log(1 + exp(rest - own))
    losses = F.softplus(logits.logsumexp(-1)[:, None] - own)
    return (losses * valid).sum(-1) / valid.sum(-1)

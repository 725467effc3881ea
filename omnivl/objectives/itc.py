"""Image-text contrast as in CLIP and SigLIP: a sample's text matches its own picture only.

Samples of one identity count as different ones.

The projections and the temperature belong to the layer that makes the embeddings (``omnivl.parts.project``), the bias
of the sigmoid loss to this objective's head.

Shapes: B samples of this replica, R rows of its regions, J joined batch (replicas * B), M embeddings of a picture, P
projection size.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import EMBEDDINGS, REGION_EMBEDDINGS, REGIONS, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, ObjectiveLoss, Temperature, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DataKind, is_pair
from omnivl.objectives.contrast import nearest_is_positive, pair_contrast, sigmoid_contrast
from omnivl.objectives.recall import recalls
from omnivl.objectives.regions import RegionObjective
from omnivl.objectives.spread_keys import SpreadKeys
from omnivl.parts.similarity import similarity

_FAR = 1e4  # exp(-_FAR) is 0 in fp64


@dataclass(frozen=True)
class Embedded:
    """L2-normalised embeddings of samples, text i beside picture i: ``visual`` and ``text``, fp32 ``[N, P]``.

    If an architecture makes several embeddings of a picture, ``visual`` is ``[N, M, P]``; see ``similarity``.
    """

    visual: Tensor
    text: Tensor


@dataclass(frozen=True)
class ITC(RegionObjective):
    """Contrast of pairs over the joined batch, without a queue and without identities.

    Attributes:
        loss_type: ``softmax``: cross-entropy over the batch in both directions. ``soft``: the same with targets from
            the similarities among pictures and among texts of the batch. ``sigmoid``: a binary loss for each pair of a
            text and a picture.
        temperature: Initial temperature; None: 0.07, or 0.1 for the sigmoid.
        temperature_bounds: Smallest and largest temperature; None: 0.01 to 1, or 1e-4 to 1e4 for the sigmoid.
        learn_temperature: Whether the temperature is learnt.
        soft_target_factor: Factor of the similarities within the modalities for soft targets: the ``scale`` (1 /
            temperature) as for logits, or the ``temperature`` as in the open implementation. There embeddings are not
            of unit length and the temperature is 1, so that both are equal. With ``temperature``, embeddings of unit
            length get nearly uniform targets and collapse.
        initial_bias: Initial bias of the sigmoid's logits, learnt; the other losses have none.
        label_smoothing: For the loss ``softmax``: share of the target's probability that is spread over the whole
            batch.

    Source: Radford et al., CLIP, arXiv 2103.00020, section 2.3 and figure 3; the scale is at most 100 (section 2.5).
        Sigmoid: Zhai et al., SigLIP, arXiv 2303.15343, algorithm 1. Soft targets are those of an open implementation of
            CLIP, which takes similarities within the modalities instead of the identity matrix.
    Differs: with soft targets embeddings are L2-normalised, unlike in that implementation; see
        ``soft_target_factor``.
    """

    kind: Literal["itc"] = "itc"
    loss_type: Literal["softmax", "soft", "sigmoid"] = "softmax"
    temperature: float | None = None
    temperature_bounds: tuple[float, float] | None = None
    learn_temperature: bool = True
    soft_target_factor: Literal["scale", "temperature"] = "scale"
    initial_bias: float = -10.0
    label_smoothing: float = 0.0

    compares_samples: ClassVar[bool] = True

    @property
    def compares_embeddings(self) -> bool:
        """Not of regions, whose number differs between pictures."""
        return not self.regions

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", "at least 0 and below 1")
        smooths = self.loss_type == "softmax" or self.label_smoothing == 0.0
        self.require(smooths, "label_smoothing", f"0 where loss_type is {self.loss_type!r}")
        self.require(self.loss_type == "softmax" or not self.regions, "loss_type", "'softmax' with regions")
        self.require(not (self.regions and self.label_smoothing), "label_smoothing", "0 with regions")

    @property
    def temperature_options(self) -> Temperature:
        """The temperature's options."""
        sigmoid = self.loss_type == "sigmoid"
        usual, bounds = (0.1, (1e-4, 1e4)) if sigmoid else (0.07, (0.01, 1.0))
        return Temperature(
            usual if self.temperature is None else self.temperature,
            bounds if self.temperature_bounds is None else self.temperature_bounds,
            self.learn_temperature,
        )

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Both embeddings, for pairs of a text and a picture or clip, or for regions."""
        if self.regions:
            reads = frozenset((*REGION_EMBEDDINGS, "logit_scale"))
            return Demands(reads=reads, regions=self.regions) if self.takes(kind) else None
        return Demands(reads=frozenset((*EMBEDDINGS, "logit_scale"))) if is_pair(kind) else None

    def build_head(self, sizes: HeadSizes) -> nn.Module | None:
        """The bias of the sigmoid's logits."""
        return BiasHead(self.initial_bias) if self.loss_type == "sigmoid" else None

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The pairs of regions and texts."""
        present = self.present(state)
        return {} if present is None else {self.key: present.sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The loss over the joined batch."""
        if self.regions:
            return self._of_regions(state, gather)
        own = Embedded(state["visual_embedding"], state["text_embedding"])
        identity, scale = state["identity"], state["logit_scale"]
        visual, text = SpreadKeys.both(own.visual, own.text, identity, gather)
        metrics = {"temperature": (1.0 / scale).detach()}
        if self.loss_type == "softmax":
            sides = pair_contrast(visual, text, scale, pairs_only=True, label_smoothing=self.label_smoothing)
            metrics |= recalls(*(side.nearest_is_positive for side in sides))
            return ObjectiveLoss((sides[0].loss.mean() + sides[1].loss.mean()) / 2.0, metrics)
        if self.loss_type == "sigmoid":
            assert isinstance(heads.own, BiasHead)
            bias = heads.own.bias[0]
            loss, nearest = sigmoid_contrast(visual, text, scale, bias)
            return ObjectiveLoss(loss.mean(), metrics | recalls(*nearest) | {"bias": bias.detach()})
        metrics |= recalls(*nearest_is_positive(visual, text))
        factor = scale if self.soft_target_factor == "scale" else 1.0 / scale
        return ObjectiveLoss(soft_target_loss(own, scale, factor, gather), metrics)

    def _of_regions(self, state: State, gather: Gather) -> ObjectiveLoss:
        """The softmax loss over all replicas' pairs of regions and texts, mean over those that are present."""
        visual, text = (state[name] for name in REGION_EMBEDDINGS)
        present, scale = state[f"{REGIONS}/present"], state["logit_scale"]
        own = without_absent(visual, text, present, scale.detach())
        keys = SpreadKeys.both(*own, self.identity_of(state), gather)
        sides = pair_contrast(*keys, scale, pairs_only=True)

        def mean(each: Tensor) -> Tensor:
            total = torch.where(present, each, 0.0).sum()
            return replica_mean(total, present.sum(), gather, state.term_weight(self.key))

        metrics = {"temperature": (1.0 / scale).detach()}
        for name, side in zip(("visual_to_text_r1", "text_to_visual_r1"), sides, strict=True):
            metrics[name] = mean(side.nearest_is_positive.float())
        return ObjectiveLoss(mean(sides[0].loss + sides[1].loss) / 2.0, metrics)


class BiasHead(Head):
    """The bias of the sigmoid's logits, a parameter of one element."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        # One element instead of a scalar: hosts that shard cannot shard a scalar.
        self.bias = nn.Parameter(torch.tensor([initial]))


def without_absent(visual: Tensor, text: Tensor, present: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings ``[R, P + 2]`` with the same products, but for absent rows: these are far from every other row.

    Two numbers more are multiplied with those of the other side: 1, and 0 or a very low number. The weight of an absent
    key in the normaliser of a present query is then exactly 0, and so are all its gradients.

    Args:
        visual: fp32 ``[R, P]``.
        text: fp32 ``[R, P]``.
        present: bool ``[R]``.
        scale: 1 / temperature, without a gradient.
    """
    far = torch.where(present, 0.0, -_FAR / scale)[:, None]
    one = torch.ones_like(far)
    return torch.cat([visual, one, far], dim=1), torch.cat([text, far, one], dim=1)


def soft_target_loss(own: Embedded, scale: Tensor, factor: Tensor, gather: Gather) -> Tensor:
    """Mean cross-entropy of both directions, halved, with targets by similarity within the modalities; a scalar.

    With texts T and pictures I of the joined batch, logits are ``scale T I'`` and targets
    ``softmax(factor (I I' + T T') / 2)`` by rows. The loss is the cross-entropy of the logits with the targets, and of
    both transposed. Rows of the transposed targets need not add up to 1. Gradients flow through the targets, too.

    A replica has the rows of its own samples. Rows of the transposed targets are columns: since similarities are
    symmetric, only the normalisers of all rows are needed for them.

    Args:
        own: This replica's embeddings, ``[B, P]``.
        scale: 1 / temperature.
        factor: Factor of the targets' similarities.
        gather: Joins embeddings and normalisers.
    """
    joined = Embedded(gather.join(own.visual), gather.join(own.text))
    alike = (similarity(own.visual, joined.visual) + similarity(own.text, joined.text)) * (factor / 2.0)
    normalisers = alike.logsumexp(-1)
    targets, transposed = (alike - normalisers[:, None]).exp(), (alike - gather.join(normalisers)).exp()
    to_visual = F.cross_entropy(scale * similarity(own.text, joined.visual), targets)
    to_text = F.cross_entropy(scale * similarity(own.visual, joined.text), transposed)
    return (to_visual + to_text) / 2.0

"""UniVLC: one contrastive loss over images and clips with captions and with class labels.

The projections and the temperature belong to the layer that makes the embeddings (``omnivl.parts.project``), the queue
to this objective's head. The queue takes its keys after the optimizer step, from an outbox.

Shapes: B queries of this replica, J joined batch (replicas * B), Q queue entries, K = J + Q keys, P projection size.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from omnivl.chain.demands import EMBEDDINGS, TWIN, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, Objective, ObjectiveLoss, PrepareContext, Temperature, ramp
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DATA_KINDS, Batch, DataKind, is_label, is_pair, is_video
from omnivl.objectives.contrast import Contrasted, Reduction, Teacher, pair_contrast, softmax_contrast
from omnivl.objectives.key_queue import KeyQueue, Keys, Pairs
from omnivl.objectives.recall import recalls
from omnivl.objectives.spread_keys import OldKeys, SpreadKeys


@dataclass(frozen=True)
class NegativeWeights:
    """Weights of negatives in the denominator, by their domain.

    A key of kind ``video_label`` counts ``video * label`` times, and so on. With 1 everywhere the loss is the plain
    one; a factor of 0 leaves these negatives out. Positives always count once.

    Attributes:
        image: Factor of keys that are images.
        video: Factor of keys that are clips.
        caption: Factor of keys with a caption.
        label: Factor of keys with a class label.
    """

    image: float = 1.0
    video: float = 1.0
    caption: float = 1.0
    label: float = 1.0

    def of_kind(self, kind: DataKind) -> float:
        """The weight of a negative of ``kind``."""
        return (self.video if is_video(kind) else self.image) * (self.label if is_label(kind) else self.caption)

    def table(self) -> tuple[float, ...]:
        """Weights in the order of ``DATA_KINDS``."""
        return tuple(self.of_kind(kind) for kind in DATA_KINDS)


@dataclass(frozen=True)
class UniVLC(Objective):
    """Contrastive loss with positives by identity over batch and queue.

    Attributes:
        positive_reduction: Whether the terms of a query's positives are averaged or summed.
        temperature: Initial temperature; it is learnt within ``temperature_bounds``.
        temperature_bounds: Smallest and largest temperature.
        learn_temperature: Whether the temperature is learnt.
        queue_size: Keys of earlier steps that are kept; 0 for none. Needs the model's momentum twins.
        batch_keys: Whether the current batch's keys are the online embeddings (with gradient) or the momentum ones.
        negative_weights: Weights of negatives by domain; None for the plain loss.
        soft_target_alpha: Share of the target that is the momentum model's own softmax; 0 for none. Needs momentum
            ``batch_keys``.
        soft_target_warmup_steps: The share rises linearly over this many steps.

    Source: Wang et al., OmniVL, arXiv 2209.07526, section 3.2; temperature and queue as in BLIP, arXiv 2201.12086; soft
        targets as in ALBEF, arXiv 2107.07651, section 3.3. Without queue and twins it is UniCL's loss (Yang et al.,
        arXiv 2204.03610, equations 1 to 3), halved.
    """

    kind: Literal["univlc"] = "univlc"
    positive_reduction: Reduction = "mean"
    temperature: float = 0.07
    temperature_bounds: tuple[float, float] = (0.001, 0.5)
    learn_temperature: bool = True
    queue_size: int = 0
    batch_keys: Literal["online", "momentum"] = "online"
    negative_weights: NegativeWeights | None = None
    soft_target_alpha: float = 0.0
    soft_target_warmup_steps: int = 0

    compares_samples: ClassVar[bool] = True

    @property
    def compares_embeddings(self) -> bool:
        """It needs embeddings and identities alone."""
        return True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.queue_size >= 0, "queue_size", "at least 0")
        self.require(0.0 <= self.soft_target_alpha < 1.0, "soft_target_alpha", "at least 0 and below 1")
        teaches = self.soft_target_alpha == 0.0 or self.batch_keys == "momentum"
        self.require(teaches, "soft_target_alpha", "0 unless batch_keys is momentum: the teacher compares its own")
        self.require(self.soft_target_warmup_steps >= 0, "soft_target_warmup_steps", "at least 0")
        weights = (1.0,) if self.negative_weights is None else self.negative_weights.table()
        self.require(min(weights) >= 0.0, "negative_weights", "at least 0 each")

    @property
    def uses_momentum(self) -> bool:
        """Whether momentum embeddings are needed."""
        return self.queue_size > 0 or self.batch_keys == "momentum"

    @property
    def temperature_options(self) -> Temperature:
        """The temperature's options."""
        return Temperature(self.temperature, self.temperature_bounds, self.learn_temperature)

    def after_training(self) -> Self:
        """The same without momentum keys and queue."""
        return replace(self.apart(), queue_size=0, batch_keys="online", soft_target_alpha=0.0)

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Both embeddings, on all kinds of pairs."""
        if not is_pair(kind):
            return None
        twins = tuple(TWIN + name for name in EMBEDDINGS) if self.uses_momentum else ()
        return Demands(reads=frozenset((*EMBEDDINGS, "logit_scale", *twins)))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """With soft targets, sets ``{key}/alpha``, fp32 scalar: their share in this step."""
        if self.soft_target_alpha == 0.0:
            return {}
        alpha = self.soft_target_alpha * ramp(context.step, self.soft_target_warmup_steps)
        return {f"{self.key}/alpha": torch.tensor(alpha, dtype=torch.float32)}

    def build_head(self, sizes: HeadSizes) -> Head | None:
        """The queue, if there is one."""
        return UniVLCHead(self.queue_size, sizes.projection_size) if self.queue_size > 0 else None

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The contrastive loss over the joined batch and the queue; puts the batch's keys into the queue's outbox."""
        queries = Pairs(state["visual_embedding"], state["text_embedding"], state["identity"])
        momentum = None
        if self.uses_momentum:
            momentum = Pairs(state["momentum_visual_embedding"], state["momentum_text_embedding"], state["identity"])
        source = queries if self.batch_keys == "online" or momentum is None else momentum
        batch = SpreadKeys.both(source.visual, source.text, source.identity, gather)
        queue = None
        if self.queue_size > 0:
            assert isinstance(heads.own, UniVLCHead)
            assert momentum is not None
            if heads.own.training and torch.is_grad_enabled():
                pushed = batch
                if source is not momentum:
                    pushed = batch[0].of_same_samples(momentum.visual), batch[0].of_same_samples(momentum.text)
                heads.own.outbox.append(pushed_keys(*pushed, state.layout.kind))
            queue = heads.own.queue.keys()
        teachers = None
        if self.soft_target_alpha > 0.0:
            assert momentum is not None
            alpha = state[f"{self.key}/alpha"]
            teachers = Teacher(momentum.visual, alpha), Teacher(momentum.text, alpha)
        scale = state["logit_scale"]
        from_visual, from_text = self.contrast(queries, batch, state.layout.kind, scale, queue, teachers)
        metrics = {
            "temperature": scale.detach().reciprocal(),
            **recalls(from_visual.nearest_is_positive, from_text.nearest_is_positive),
            "positives": from_visual.positives.mean(),
        }
        if queue is not None:
            metrics["queue_valid"] = queue.valid.float().mean()
        return ObjectiveLoss((from_visual.loss.mean() + from_text.loss.mean()) / 2.0, metrics)

    def contrast(
        self,
        queries: Pairs,
        batch: tuple[SpreadKeys, SpreadKeys],
        kind: DataKind,
        scale: Tensor,
        queue: Keys | None = None,
        teachers: tuple[Teacher, Teacher] | None = None,
    ) -> tuple[Contrasted, Contrasted]:
        """Pictures and clips against all texts, and texts against all pictures and clips.

        Args:
            queries: Online embeddings of this replica.
            batch: Visual and textual keys; the queries themselves where ``batch_keys`` is online.
            kind: Of the batch, on every replica.
            scale: 1 / temperature, scalar.
            queue: Older keys.
            teachers: Visual and textual queries of the momentum model, for soft targets.
        """
        weights = None if self.negative_weights is None else torch.tensor(self.negative_weights.table()).log()
        log_weight = None if weights is None else float(weights[DATA_KINDS.index(kind)])

        olds = None
        if queue is not None:
            by_domain = None if weights is None else weights.to(queue.domain.device)[queue.domain]
            olds = [OldKeys(keys, queue.identity, queue.valid, by_domain) for keys in (queue.visual, queue.text)]
        reduction = self.positive_reduction
        if self.batch_keys == "online":
            old = None if olds is None else (olds[0], olds[1])
            return pair_contrast(*batch, scale, reduction=reduction, log_weight=log_weight, old=old)
        (old_visual, old_text), (seeing, reading) = olds or (None, None), teachers or (None, None)
        sides = (queries.visual, batch[1], old_text, seeing), (queries.text, batch[0], old_visual, reading)
        from_visual, from_text = (
            softmax_contrast(
                *(query, queries.identity, keys, scale),
                reduction=reduction,
                log_weight=log_weight,
                old=old,
                teacher=teacher,
            )
            for query, keys, old, teacher in sides
        )
        return from_visual, from_text


class UniVLCHead(Head):
    """The queue, and the keys of a step's micro-batches, which are pushed after the optimizer step."""

    def __init__(self, queue_size: int, projection_size: int) -> None:
        super().__init__()
        self.queue = KeyQueue(queue_size, projection_size)
        self.outbox: list[Keys] = []

    def after_step(self, gather: Gather) -> None:
        """Pushes the step's keys into the queue, oldest micro-batch first."""
        for keys in self.outbox:
            self.queue.push(keys)
        self.outbox.clear()

    def discard_step(self) -> None:
        """Drops the step's keys."""
        self.outbox.clear()


def pushed_keys(visual: SpreadKeys, text: SpreadKeys, kind: DataKind) -> Keys:
    """The keys of all replicas' samples for the queue. Every replica's batch has the same kind."""
    seen, read = visual.joined(), text.joined()
    domain = torch.full_like(seen.identity, DATA_KINDS.index(kind))
    return Keys(seen.keys, read.keys, seen.identity, domain, torch.ones_like(domain, dtype=torch.bool))

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
from omnivl.objectives.key_queue import KeyQueue, Keys, Pairs
from omnivl.objectives.recall import recalls_at_1
from omnivl.parts.similarity import similarity

Reduction = Literal["mean", "sum"]


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
        targets as in ALBEF, arXiv 2107.07651, section 3.3.
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
        online = self.batch_keys == "online"
        source = queries if online or momentum is None else momentum
        keys = joined_keys(source, state.layout.kind, gather)
        num_batch_keys = len(keys.identity)
        if self.queue_size > 0:
            assert isinstance(heads.own, UniVLCHead)
            assert momentum is not None
            if heads.own.training and torch.is_grad_enabled():
                heads.own.outbox.append(joined_keys(momentum, state.layout.kind, gather) if online else keys)
            keys = keys.followed_by(heads.own.queue.keys())
        soft = None
        if self.soft_target_alpha > 0.0:
            assert momentum is not None
            soft = SoftTargets(momentum.visual, momentum.text, state[f"{self.key}/alpha"])
        scale = state["logit_scale"]
        metrics = contrast_metrics(queries, keys, num_batch_keys, 1.0 / scale)
        return ObjectiveLoss(self.contrast(queries, keys, scale, soft), metrics)

    def contrast(self, queries: Pairs, keys: Keys, scale: Tensor, soft: "SoftTargets | None" = None) -> Tensor:
        """The loss, a scalar: mean over queries of both directions, halved.

        Args:
            queries: Online embeddings of this replica.
            keys: Keys of the joined batch and of the queue.
            scale: 1 / temperature, scalar.
            soft: Momentum queries and the share of soft targets.
        """
        positive = positives(queries.identity, keys)
        log_weights = self._log_weights(keys)
        losses = []
        for query, key, soft_query in (
            (queries.visual, keys.text, None if soft is None else soft.visual),
            (queries.text, keys.visual, None if soft is None else soft.text),
        ):
            logits = scale * similarity(query, key)
            if soft is None or soft_query is None:
                targets = hard_targets(positive, self.positive_reduction)
            else:
                teacher = scale.detach() * similarity(soft_query, key.detach())
                targets = soft_targets(teacher, positive, keys.valid, soft.alpha, self.positive_reduction)
            losses.append(contrastive_loss(logits, positive, keys.valid, targets, log_weights).mean())
        return (losses[0] + losses[1]) / 2.0

    def _log_weights(self, keys: Keys) -> Tensor | None:
        """Log of every key's weight as a negative, ``[K]``."""
        if self.negative_weights is None:
            return None
        return torch.tensor(self.negative_weights.table(), device=keys.domain.device).log()[keys.domain]


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


def joined_keys(pairs: Pairs, kind: DataKind, gather: Gather) -> Keys:
    """The keys of all replicas' samples. Every replica's batch has the same kind."""
    identity = gather.join(pairs.identity)
    domain = torch.full_like(identity, DATA_KINDS.index(kind))
    valid = torch.ones_like(identity, dtype=torch.bool)
    return Keys(gather.join(pairs.visual), gather.join(pairs.text), identity, domain, valid)


@dataclass(frozen=True)
class SoftTargets:
    """Momentum embeddings of the queries, fp32 ``[B, P]``, and the scalar share of the soft part of the target."""

    visual: Tensor
    text: Tensor
    alpha: Tensor


def positives(identity: Tensor, keys: Keys) -> Tensor:
    """Bool ``[B, K]``: the key is valid and has the query's identity."""
    return (identity[:, None] == keys.identity) & keys.valid


def hard_targets(positive: Tensor, reduction: Reduction) -> Tensor:
    """Weight of each key's term, fp32 ``[B, K]``: 1 for positives (``sum``), or 1 / their number (``mean``).

    A query without a positive gets zeros.
    """
    weights = positive.float()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1.0) if reduction == "mean" else weights


def soft_targets(teacher: Tensor, positive: Tensor, valid: Tensor, alpha: Tensor, reduction: Reduction) -> Tensor:
    """``alpha * softmax(teacher) + (1 - alpha) * hard targets``, fp32 ``[B, K]``, no gradient.

    Args:
        teacher: The momentum model's similarities over temperature ``[B, K]``.
        positive: Bool ``[B, K]``.
        valid: Bool ``[K]``.
        alpha: Scalar.
        reduction: As for ``hard_targets``.

    Source: ALBEF, arXiv 2107.07651, eq. 6.
    """
    soft = teacher.detach().float().masked_fill(~valid, float("-inf")).softmax(-1)
    return alpha * soft + (1.0 - alpha) * hard_targets(positive, reduction)


def contrastive_loss(
    logits: Tensor, positive: Tensor, valid: Tensor, targets: Tensor, log_weights: Tensor | None = None
) -> Tensor:
    """``- sum_k targets_k log(exp(logit_k) / sum_m w_m exp(logit_m))`` for each query.

    Args:
        logits: Similarities over temperature ``[B, K]``.
        positive: Bool ``[B, K]``.
        valid: Bool ``[K]``; other keys do not exist.
        targets: ``[B, K]``, 0 where not valid.
        log_weights: log w ``[K]`` of each key as a negative; a positive's w is 1. None: all 1.

    Returns:
        fp32 ``[B]``.
    """
    logits = logits.float()
    shifted = logits if log_weights is None else torch.where(positive, logits, logits + log_weights)
    normaliser = shifted.masked_fill(~valid, float("-inf")).logsumexp(-1)
    return targets.sum(-1) * normaliser - (targets * logits).sum(-1)


@torch.no_grad()
def contrast_metrics(queries: Pairs, keys: Keys, num_batch_keys: int, temperature: Tensor) -> dict[str, Tensor]:
    """Metrics of one step.

    Args:
        queries: Online embeddings of this replica.
        keys: Keys of the joined batch, then of the queue.
        num_batch_keys: J.
        temperature: Scalar.

    Returns:
        ``temperature``; ``recalls_at_1`` among the keys of the joined batch; ``positives``: mean number of positives;
        ``queue_valid``: share of the queue that is filled, if there is a queue.
    """
    batch = Pairs(keys.visual[:num_batch_keys], keys.text[:num_batch_keys], keys.identity[:num_batch_keys])
    metrics = {
        "temperature": temperature.detach(),
        **recalls_at_1(queries, batch),
        "positives": positives(queries.identity, keys).sum(-1).float().mean(),
    }
    if len(keys.valid) > num_batch_keys:
        metrics["queue_valid"] = keys.valid[num_batch_keys:].float().mean()
    return metrics

"""Distillation of embeddings: the student's similarities follow a finished teacher's, and its features if asked for.

Shapes: B samples of this replica, J joined batch (replicas * B), L text positions, S visual positions, P projection
size, D hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.backward import Backward
from omnivl.chain.demands import CLEAN, EMBEDDINGS, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch, DataKind, is_pair
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.objectives.teacher import FEATURES, Taught, TaughtHead, TeacherFacts
from omnivl.parts.linear import Linear
from omnivl.parts.similarity import similarity


@dataclass(frozen=True)
class Distil(Taught):
    """The student's distributions over the joined batch follow the teacher's, on all kinds of pairs.

    With texts and pictures of the joined batch, each text has a distribution over the pictures by the teacher, the
    softmax of its similarities over the teacher's temperature, and one by the student over the student's temperature.
    The loss is the divergence KL(teacher || student), averaged over texts; likewise of pictures over texts; halved.

    Attributes:
        contrast: Factor of the divergence; 0 leaves it out.
        features: Streams, ``visual`` and ``text``, whose last states follow the teacher's at every position, by a
            linear map, each with the teacher's hidden size, e.g. ``{visual: 192}``.
        feature_weight: Factor of the features' distance.
        feature_loss: ``cosine``: 1 - cosine; ``mse``: mean squared difference over the teacher's values.

    Source: Hinton et al., arXiv 1503.02531, section 2 (softened targets, factor of the square); Yang et al., CLIP-KD,
        arXiv 2307.12732 (contrastive relational distillation, feature distillation).
    Differs: features are those of all positions, not the embedding alone.
    """

    kind: Literal["distil"] = "distil"
    contrast: float = 1.0
    features: Mapping[str, Annotated[int, Range(1)]] = field(default_factory=dict)
    feature_weight: float = 1.0
    feature_loss: Literal["cosine", "mse"] = "cosine"

    compares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.contrast >= 0.0, "contrast", "at least 0")
        self.require(self.feature_weight >= 0.0, "feature_weight", "at least 0")
        self.require(set(self.features) <= set(FEATURES), "features", f"widths of {' and '.join(FEATURES)}")
        self.require(self.contrast > 0.0 or bool(self.features), "contrast", "above 0 where there are no features")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Both embeddings if they are compared, and all positions of the streams whose features are taught."""
        if not is_pair(kind):
            return None
        compared = (*EMBEDDINGS, "logit_scale") if self.contrast > 0.0 else ()
        return Demands(reads=frozenset((*compared, *self.features)))

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """No teacher; features of pictures that keep their sizes."""
        yield from super().misfits(inputs, batch_size)
        if "visual" in self.features and inputs.native:
            yield Misfit(("features",), "'visual'", "'text' where pictures keep their sizes", "leave it out")

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """``{key}/is_token`` bool ``[B, L]``, where features of texts are taught."""
        if "text" not in self.features:
            return {}
        assert batch.token_ids is not None, "a pair has a text"
        return {f"{self.key}/is_token": batch.token_ids != context.tokens.pad}

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The tokens of texts whose features are taught."""
        return {self.key: state[f"{self.key}/is_token"].sum()} if "text" in self.features else {}

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """The teacher's place, and the maps to its features."""
        return DistilHead(sizes, self.features)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The divergence over the joined batch, and the distance of features."""
        head = heads.own
        assert isinstance(head, DistilHead)
        lesson = head.taught_by.lesson(state, self.features)
        parts: dict[str, Tensor] = {}
        if self.contrast > 0.0:
            student = state["visual_embedding"], state["text_embedding"]
            divergence = contrastive_divergence(
                student, state["logit_scale"], (lesson.visual, lesson.text), lesson.scale, gather, self.soften
            )
            parts["contrast"] = self.contrast * divergence
        for stream, wanted in lesson.features.items():
            made = head.maps[stream](state.rows(stream, CLEAN).float())
            distance = feature_distance(made, wanted.float(), self.feature_loss)
            if stream == "text":
                is_token = state[f"{self.key}/is_token"]
                total = (distance * is_token).sum()
                mean = replica_mean(total, is_token.sum(), gather, state.term_weight(self.key))
            else:
                mean = distance.mean()
            parts[stream] = self.feature_weight * mean
        metrics = {name: part.detach() for name, part in parts.items()}
        return ObjectiveLoss(torch.stack(list(parts.values())).sum(), metrics)

    def unfit(self, facts: TeacherFacts, own: InputSizes, shown: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Also a teacher without embeddings, and features of other sizes."""
        yield from super().unfit(facts, own, shown)
        if "embedding" not in facts.streams:
            yield "that makes no embeddings", "one with the stream 'embedding'", "take another teacher"
        for stream, width in self.features.items():
            if facts.widths[stream] != width:
                got = f"whose stream {stream!r} has width {facts.widths[stream]}"
                yield got, f"that of features.{stream}, {width}", f"set features.{stream} to {facts.widths[stream]}"
        patches = ("patch_size", "tubelet_size") if "clip" in shown else ("patch_size",)
        for name in patches if "visual" in self.features else ():
            theirs, ours = getattr(facts.inputs, name), getattr(own, name)
            if theirs != ours:
                got, allowed = f"with {name} {theirs}", f"the student's, {ours}, where visual features are taught"
                yield got, allowed, "leave features.visual out, or change the student's model"


class DistilHead(TaughtHead):
    """Linear maps from the student's features to the teacher's, by stream."""

    def __init__(self, sizes: HeadSizes, features: Mapping[str, int]) -> None:
        super().__init__()
        maps = {stream: Linear(sizes.widths[stream], width) for stream, width in features.items()}
        self.maps = nn.ModuleDict(maps)

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of the teacher."""
        return 0.0 if self.teacher is None else self.teacher.flops(layout)


def contrastive_divergence(
    student: tuple[Tensor, Tensor],
    scale: Tensor,
    teacher: tuple[Tensor, Tensor],
    teacher_scale: Tensor,
    gather: Gather,
    soften: float = 1.0,
) -> Tensor:
    """``soften^2 * (KL(texts over pictures) + KL(pictures over texts)) / 2``, means over own samples, fp32 scalar.

    Args:
        student: Visual and text embeddings of this replica, L2-normalised, ``[B, P]``.
        scale: 1 / temperature of the student.
        teacher: The teacher's, ``[B, P']``, without gradient.
        teacher_scale: 1 / temperature of the teacher.
        gather: Joins embeddings.
        soften: Divides all logits.
    """

    def log_shares(own: tuple[Tensor, Tensor], factor: Tensor) -> list[Tensor]:
        visual, text = own
        visuals, texts = gather.join(visual), gather.join(text)
        logits = similarity(text, visuals), similarity(visual, texts)
        return [F.log_softmax(one * (factor / soften), dim=-1) for one in logits]

    with torch.no_grad():
        wanted = log_shares(teacher, teacher_scale)
    made = log_shares(student, scale)
    sides = [divergence(right, own).mean() for own, right in zip(made, wanted, strict=True)]
    return soften**2 * (sides[0] + sides[1]) / 2.0


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of distributions by rows, ``[N]``."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def feature_distance(made: Tensor, wanted: Tensor, kind: Literal["cosine", "mse"]) -> Tensor:
    """Distance at each position, ``[B, S]``, of features ``[B, S, D]``."""
    if kind == "mse":
        return (made - wanted).square().mean(-1)
    return 1.0 - F.cosine_similarity(made, wanted, dim=-1)

"""Classification of images and clips by a trained head: actions, linear probes.

Shapes: B samples, R rows, S visual positions, D width of the visual stream, C classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import CLEAN, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.positions import IGNORED
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, visual_of
from omnivl.data.fields import Field
from omnivl.data.lists import EMBEDDED_LISTS, embedded_list
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.objectives.text_lists import length_misfits, list_or_path, read_list, stand_ins
from omnivl.parts.linear import LayerNorm, Linear


@dataclass(frozen=True)
class Recognize(Objective):
    """Which of a list of classes does the image or clip show? A linear head on its visual features is trained.

    With everything but the head frozen (``freeze`` of the stage) this is a linear probe. Samples whose class is not in
    the list are left out and not counted.

    Attributes:
        classes: The list, the path of a text file with a class on each line, or an embedded list: ``emoji_labels``,
            ``motions``. ``omnivl data values`` writes such files.
        num_classes: Expected length of the list, as a check; null allows any. Where the file is not there, it stands
            for the list in checks and estimates.
        field: Field of a sample that holds its class.
        pool: ``mean`` reads the mean of all patches, ``first`` the class token.
        label_smoothing: Share of the target's probability that is spread over all classes.
        dropout: Of the pooled features.

    Source: Tong et al., VideoMAE, arXiv 2203.12602, and its code: the mean of the patches, LayerNorm, linear.
    """

    kind: Literal["recognize"] = "recognize"
    classes: str | tuple[str, ...] = ()
    num_classes: int | None = None
    field: str = "label"
    pool: Literal["mean", "first"] = "mean"
    label_smoothing: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks the options and reads the list.

        Raises:
            UserError: An option is out of its range, or the list cannot be read.
        """
        super().__post_init__()
        self.require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", "at least 0 and below 1")
        self.require(0.0 <= self.dropout < 1.0, "dropout", "at least 0 and below 1")
        if self.classes not in EMBEDDED_LISTS:
            kept = list_or_path(self.classes, f"objective {self.key}", "classes", self.num_classes)
            object.__setattr__(self, "classes", kept)

    @property
    def choices(self) -> tuple[str, ...]:
        """The classes.

        Raises:
            UserError: Their file is not there.
        """
        if isinstance(self.classes, tuple):
            return self.classes
        if self.classes in EMBEDDED_LISTS:
            return embedded_list(self.classes)
        return read_list(self.classes, f"objective {self.key}", "classes")

    @property
    def num_choices(self) -> int:
        """The number of classes."""
        return (self.num_classes or 0) if self.absent_lists else len(self.choices)

    @property
    def absent_lists(self) -> Mapping[str, str]:
        """See ``Objective``."""
        path = self.classes
        return {"classes": path} if isinstance(path, str) and path not in EMBEDDED_LISTS else {}

    def with_stand_ins(self) -> Self:
        """See ``Objective``."""
        return replace(self, classes=stand_ins(self.num_choices)) if self.absent_lists else self

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """The class."""
        return {self.field: Field("text")}

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """A list with fewer than two classes, or of another length than ``num_classes``."""
        if self.num_choices < 2:
            got = f"{self.num_choices} classes"
            yield Misfit(("classes",), got, "two or more", "give a list, or the path of a file that holds it")
        if self.classes not in EMBEDDED_LISTS:
            yield from length_misfits(self.classes, self.num_classes, "classes", "num_classes")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The visual features."""
        return self.asks(kind, batch_size) if visual_of(kind) in ("image", "clip") else None

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """The visual features."""
        return Demands(reads=frozenset({"visual"}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/targets``, int64 ``[B]``."""
        places = {name: place for place, name in enumerate(self.choices)}
        named = [places.get(str(name), IGNORED) for name in batch.fields[self.field]]
        return {f"{self.key}/targets": torch.tensor(named, dtype=torch.int64)}

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """A score for each class."""
        return ClassHead(sizes.widths["visual"], self.num_choices, self.pool, self.dropout)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The samples whose class is in the list."""
        return {self.key: (state[f"{self.key}/targets"] != IGNORED).sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Cross-entropy, mean over the samples whose class is in the list. Metric: their ``accuracy``."""
        targets, logits = state[f"{self.key}/targets"], self.predict(state, heads)
        total = F.cross_entropy(
            logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        count = (targets != IGNORED).sum()
        with torch.no_grad():
            right = (logits.argmax(-1) == targets).sum() / count.clamp(min=1)
        return ObjectiveLoss(replica_mean(total, count, gather, state.term_weight(self.key)), {"accuracy": right})

    def predict(self, state: State, heads: Heads) -> Tensor:
        """A score for each class, fp32 ``[B, C]``."""
        assert isinstance(heads.own, ClassHead)
        mask = state.get(f"visual_mask/{CLEAN}", state.get("visual_mask"))
        scores: Tensor = heads.own(state.rows("visual", CLEAN), mask)
        return scores


class ClassHead(nn.Module):
    """The mean of the patches or the class token, LayerNorm, dropout, and a score for each class."""

    def __init__(self, width: int, classes: int, pool: str, dropout: float) -> None:
        super().__init__()
        self.pool, self.dropout = pool, dropout
        self.norm, self.output = LayerNorm(width, eps=1e-6), Linear(width, classes)

    def forward(self, visual: Tensor, mask: Tensor | None) -> Tensor:
        """fp32 ``[B, C]``.

        Args:
            visual: ``[B, S, D]``, the class token first.
            mask: bool ``[B, S]``, which positions are no padding; None: all.
        """
        if self.pool == "first":
            whole = visual[:, 0]
        elif mask is None:
            whole = visual[:, 1:].mean(dim=1)
        else:
            kept = mask[:, 1:, None].to(visual.dtype)
            whole = (visual[:, 1:] * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        scores: Tensor = self.output(F.dropout(self.norm(whole), self.dropout, self.training)).float()
        return scores

"""Codes of patches: targets of masked visual objectives that are classes, from a fixed codebook.

A codebook turns what a patch is, its pixels or a twin's features, into the number of a code; or a picture tokenizer
that another stage has trained does, from whole images. A new kind of codebook is a configuration with ``num_codes`` and
``build``.

Shapes: M masked rows, B images, N patches of an image, K masked patches of all rows, C values of a patch, V codes, W
width of a code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.backward import Backward
from omnivl.chain.state import State, StepLayout
from omnivl.data.sizes import InputSizes
from omnivl.objectives.teacher import Pupil, TaughtHead, TeacherFacts
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.padding import selected


@dataclass(frozen=True)
class RandomCodebook:
    """The nearest of random vectors to a random projection of a patch. Nothing of it is trained.

    Attributes:
        num_codes: Number V of codes.
        width: Width W of the projection and of codes.
        seed: Of both. Objectives with equal codebooks have equal codes.

    Source: Chiu et al., BEST-RQ, arXiv 2202.01855, section 3.1: the projection is Xavier's, codes are normal.
    Differs: lengths are not normalised, so that light patches and dark ones have different codes; codes have the
        deviation of projected values of unit variance.
    """

    kind: Literal["random"] = "random"
    num_codes: Annotated[int, Range(2)] = 8192
    width: Annotated[int, Range(1)] = 16
    seed: int = 0

    def build(self, values: int) -> nn.Module:
        """The codebook of patches of C values."""
        return RandomCodes(self, values)


class RandomCodes(nn.Module):
    """Maps patches to codes; buffers only."""

    projection: Tensor
    codes: Tensor

    def __init__(self, config: RandomCodebook, values: int) -> None:
        super().__init__()
        random = torch.Generator(device="cpu").manual_seed(config.seed)
        bound = (6.0 / (values + config.width)) ** 0.5
        projection = torch.rand(values, config.width, generator=random, device="cpu") * (2 * bound) - bound
        codes = torch.randn(config.num_codes, config.width, generator=random, device="cpu")
        codes *= (2.0 * values / (values + config.width)) ** 0.5
        # Of the device in which the head is built: none of it, in an outline.
        device = torch.empty(0).device
        self.register_buffer("projection", projection.to(device))
        self.register_buffer("codes", codes.to(device))

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """The codes, int64 ``[K]``, of ``patches [K, C]``: |p - c|^2 is smallest where p . c - |c|^2 / 2 is largest."""
        codes = self.codes.float()
        scores = patches.float() @ self.projection.float() @ codes.t() - codes.square().sum(1) / 2
        return scores.argmax(1)


@dataclass(frozen=True)
class TrainedCodebook(Pupil):
    """Codes of a picture tokenizer that a finished stage has trained by ``quantize``; it sees the whole image.

    Attributes:
        num_codes: V, that of the tokenizer's quantizer.
        teacher: See ``Pupil``: where the tokenizer is.
        teacher_stage: See ``Pupil``.
        objective: Key of the objective that trained it.

    Source: Bao et al., BEiT, arXiv 2106.08254, section 2.3.
    Differs: tokenizer and student have patches of one size. A clip's frames have no codes.
    """

    reads_texts: ClassVar[bool] = False

    kind: Literal["trained"] = "trained"
    num_codes: Annotated[int, Range(2)] = 8192
    teacher: str | None = None
    teacher_stage: str | None = None
    objective: str = "quantize"

    def build(self, values: int) -> nn.Module:
        """The place of the tokenizer."""
        return TrainedCodes(self)

    def unfit(self, facts: TeacherFacts, own: InputSizes, shown: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Also a teacher without the tokenizer, with another number of codes, or with patches of another size."""
        if self.objective not in facts.codes:
            known = ", ".join(map(repr, facts.codes)) or "none"
            yield (
                f"without a tokenizer {self.objective!r}",
                f"one with it; it has {known}",
                "name one in codebook.objective",
            )
        elif facts.codes[self.objective] != self.num_codes:
            got = f"with {facts.codes[self.objective]} codes"
            yield got, f"codebook.num_codes, {self.num_codes}", f"set that to {facts.codes[self.objective]}"
        if "clip" in shown:
            yield "for clips", "one for images", "leave out the codebook"
        if facts.inputs.patch_size != own.patch_size:
            yield f"with patch_size {facts.inputs.patch_size}", f"the student's, {own.patch_size}", "change either"
        yield from super().unfit(facts, own, shown)


class TrainedCodes(TaughtHead):
    """Where a tokenizer stands beside the head."""

    def __init__(self, config: TrainedCodebook) -> None:
        super().__init__()
        self.objective = config.objective

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of the tokenizer's encoder."""
        return 0.0 if self.teacher is None else self.teacher.flops(layout, self.objective)

    def forward(self, state: State, rows: Tensor, chosen: Tensor) -> Tensor:
        """The codes of masked patches, int64 ``[K]``.

        Args:
            state: With the batch's ``frames``.
            rows: int64 ``[M]``, the image of each masked row.
            chosen: int64 ``[K]``, the masked patches, counted over all rows.
        """
        return self.taught_by.codes(state, self.objective)[rows].flatten()[chosen]


Codebook = Annotated[RandomCodebook | TrainedCodebook, Field(discriminator="kind")]
"""All codebooks that a plan can name, discriminated by ``kind``."""


def pupils_of(codebook: "Codebook | None") -> tuple[Pupil, ...]:
    """The codebook, if it is a finished model's."""
    return (codebook,) if isinstance(codebook, TrainedCodebook) else ()


class CodeHead(nn.Module):
    """Scores of codes at masked patches, and the codebook that says which are right."""

    def __init__(self, hidden_size: int, codebook: Codebook, values: int) -> None:
        """Builds the head.

        Args:
            hidden_size: Width of the stream.
            codebook: Of the targets.
            values: C.
        """
        super().__init__()
        self.scores = VocabularyHead(hidden_size, codebook.num_codes)
        self.codebook = codebook.build(values)

    def distances(self, features: Tensor, chosen: Tensor, codes: Tensor) -> Tensor:
        """The cross-entropy at each masked patch, fp32 ``[K]``.

        Args:
            features: ``[M, N, D]`` of all patches.
            chosen: int64 ``[K]``, the masked ones, counted over all rows.
            codes: Theirs, int64 ``[K]``.
        """
        return F.cross_entropy(self.scores(selected(features, chosen)), codes, reduction="none")

"""Streams whose rows join modalities, and modules that have other weights for some of their positions.

Shapes: R rows, S positions of a row, D hidden size, I inputs, O outputs.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.attribute import AttributeLinear
from moe.config import AttributeConfig, MoMEConfig
from moe.modality import expert_of, experts_of, has_fusion
from moe.slot import Slot
from omnivl.parts.attributes import Attributes, attributes_of

VISION, LANGUAGE = "vision", "language"


@dataclass(frozen=True)
class Part:
    """A run of positions of one modality in every row of a stream.

    Attributes:
        modality: One of ``MODALITIES``.
        length: Number of positions.
    """

    modality: str
    length: int

    @property
    def side(self) -> str:
        """Which of the weights by modality its tokens use; clips use those of images."""
        return LANGUAGE if self.modality == "text" else VISION


@dataclass(frozen=True)
class Stream:
    """Rows with the same parts.

    Attributes:
        x: ``[R, S, D]``.
        parts: Runs of positions; their lengths add up to S.
        mask: bool ``[R, S]``, true where there is a token; None where all are.
    """

    x: Tensor
    parts: tuple[Part, ...]
    mask: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether its rows join modalities."""
        return len(self.parts) > 1

    @property
    def attributes(self) -> list[Attributes]:
        """The attributes of each part's tokens."""
        return [attributes_of(part.modality, fused=self.fused) for part in self.parts]

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[R, S, ...]`` part by part."""
        return torch.split(x, [part.length for part in self.parts], dim=1)


class ByModality(nn.Module):
    """One module for all positions, or one for each side of a stream."""

    def __init__(self, build: Callable[[], nn.Module], multiway: bool) -> None:
        super().__init__()
        self.multiway = multiway
        if multiway:
            self.sides = nn.ModuleDict({side: build() for side in (VISION, LANGUAGE)})
        else:
            self.shared = build()

    def idle(self, reached: Collection[tuple[str, bool]]) -> Iterator[nn.Parameter]:
        """Parameters that no token uses where all are of the kinds in ``reached``, (modality, fused) each."""
        if self.multiway:
            met = {Part(modality, 0).side for modality, _ in reached}
            for side in self.sides.keys() - met:
                yield from self.sides[side].parameters()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Maps ``x [R, S, ...]``, whose positions are those of ``stream``."""
        if not self.multiway:
            out: Tensor = self.shared(x)
            return out
        made = [self.sides[part.side](piece) for part, piece in zip(stream.parts, stream.cut(x), strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)


class ByPerceptron(nn.Module):
    """One module for each perceptron by modality that stands behind it.

    Source: Bao et al., VLMo, arXiv 2111.02358; their released code has a second norm for images, one for texts and, in
        blocks with a perceptron for joined tokens, one for these.
    """

    def __init__(self, build: Callable[[], nn.Module], config: MoMEConfig, slot: Slot) -> None:
        super().__init__()
        self._config, self._fuses = config, has_fusion(config, slot.block)
        self.perceptrons = nn.ModuleDict({name: build() for name in experts_of(config, slot)})

    def idle(self, reached: Collection[tuple[str, bool]]) -> Iterator[nn.Parameter]:
        """Parameters that no token uses where all are of the kinds in ``reached``, (modality, fused) each."""
        met = {expert_of(self._config, self._fuses, *kind) for kind in reached}
        for name in self.perceptrons.keys() - met:
            yield from self.perceptrons[name].parameters()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Maps ``x [R, S, ...]``, whose positions are those of ``stream``."""
        names = [expert_of(self._config, self._fuses, part.modality, stream.fused) for part in stream.parts]
        if len(set(names)) == 1:
            out: Tensor = self.perceptrons[names[0]](x)
            return out
        made = [self.perceptrons[name](piece) for name, piece in zip(names, stream.cut(x), strict=True)]
        return torch.cat(made, dim=1)


class ByAttributes(ByModality):
    """A linear map with experts that are chosen by the attributes of each part."""

    def __init__(self, config: AttributeConfig, inputs: int, outputs: int) -> None:
        super().__init__(lambda: AttributeLinear(config, inputs, outputs), multiway=False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Maps ``x [R, S, I]``, whose positions are those of ``stream``, to ``[R, S, O]``."""
        made = self.shared(stream.cut(x), stream.attributes)
        out: Tensor = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        return out

"""Streams whose rows join modalities, and modules that have other weights for some of their positions.

Shapes: R rows, S positions of a row, n positions that are kept, D hidden size, I inputs, O outputs.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe.attribute import AttributeLinear
from moe.config import AttributeConfig, MoMEConfig
from moe.modality import expert_of, experts_of, has_fusion
from moe.slot import Slot
from omnivl.chain.positions import chosen_positions
from omnivl.parts.attributes import Attributes, attributes_of
from omnivl.parts.padding import Padding

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
        x: ``[R, S, D]``, or with ``padding`` the kept positions ``[n, D]``, part by part.
        parts: Runs of positions; their lengths add up to S.
        mask: bool ``[R, S]``, true where there is a token; None where all are.
        kept: int64 ``[n]``, of a single part: the positions to compute where they are known.
        padding: Which positions are left out of ``x``.
        counts: How many positions of each part are kept.
    """

    x: Tensor
    parts: tuple[Part, ...]
    mask: Tensor | None = None
    kept: Tensor | None = None
    padding: Padding | None = None
    counts: tuple[int, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether its rows join modalities."""
        return len(self.parts) > 1

    @property
    def attributes(self) -> list[Attributes]:
        """The attributes of each part's tokens."""
        return [attributes_of(part.modality, fused=self.fused) for part in self.parts]

    @property
    def valid(self) -> Tensor | None:
        """Which positions of ``x`` hold a token; None where all do."""
        return self.mask if self.padding is None else self.padding.valid

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[R, S, ...]``, or ``[n, ...]`` of kept positions, part by part."""
        if self.padding is not None:
            return torch.split(x, list(self.counts))
        return torch.split(x, [part.length for part in self.parts], dim=1)

    def put_together(self, pieces: Sequence[Tensor]) -> Tensor:
        """The reverse of ``cut``."""
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(list(pieces), dim=1 if self.padding is None else 0)

    def without_padding(self) -> "Stream":
        """The kept positions alone, where that saves time; see ``Padding.worth_dropping``."""
        if self.mask is None:
            return self
        if not self.fused:
            padding = Padding.worth_dropping(self.mask, self.kept)
            counts: tuple[int, ...] = () if padding is None else (len(padding.index),)
        else:
            padding, counts = self._padding_of_parts(self.mask)
        return self if padding is None else replace(self, x=padding.drop(self.x), padding=padding, counts=counts)

    def _padding_of_parts(self, mask: Tensor) -> tuple[Padding | None, tuple[int, ...]]:
        """The padding of rows with several parts, whose kept positions are known to their device alone."""
        if Padding.worth_dropping(mask) is None:
            return None, ()
        kept, first, positions = list[Tensor](), 0, mask.shape[1]
        for part in self.parts:
            chosen = chosen_positions(mask[:, first : first + part.length])
            kept.append(chosen // part.length * positions + first + chosen % part.length)
            first += part.length
        return Padding(mask, torch.cat(kept), in_order=False), tuple(map(len, kept))


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
        return stream.put_together(made)


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
        return stream.put_together(made)


class ByAttributes(ByModality):
    """A linear map with experts that are chosen by the attributes of each part."""

    def __init__(self, config: AttributeConfig, inputs: int, outputs: int) -> None:
        super().__init__(lambda: AttributeLinear(config, inputs, outputs), multiway=False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Maps ``x [R, S, I]``, whose positions are those of ``stream``, to ``[R, S, O]``."""
        return stream.put_together(self.shared(stream.cut(x), stream.attributes))

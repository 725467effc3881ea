"""Information about a layer's tokens: their modality, and which of them are padding.

Shapes: T tokens, in the order of ``x [..., D]`` with flattened leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one modality.

    Attributes:
        modality: Its name.
        length: Number of tokens.
        fused: Whether the tokens stand in a sequence that joins modalities.
        attributes: Further bits that describe the kind of these tokens; only attribute routing reads them.
    """

    modality: str
    length: int
    fused: bool = False
    attributes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """All tokens of a call. Lengths are Python integers, so that nothing is read back from a device.

    Attributes:
        segments: Runs of one modality, end to end; together T tokens.
        valid: bool ``[T]``, false where there is only padding; None where there is none.
    """

    segments: tuple[Segment, ...]
    valid: Tensor | None = None

    @classmethod
    def of(
        cls,
        modality: str,
        x: Tensor,
        valid: Tensor | None = None,
        *,
        fused: bool = False,
        attributes: tuple[int, ...] = (),
    ) -> "Tokens":
        """All tokens of ``x [..., D]`` as one segment; ``valid`` has the leading dimensions of ``x``."""
        segment = Segment(modality, x.shape[:-1].numel(), fused, attributes)
        return cls((segment,), None if valid is None else valid.reshape(-1))

    @property
    def count(self) -> int:
        """T."""
        return sum(segment.length for segment in self.segments)

    def modality_ids(self, modalities: Sequence[str], device: torch.device) -> Tensor:
        """int64 ``[T]``: the index of each token's modality in ``modalities``."""
        return torch.cat(
            [
                torch.full((segment.length,), modalities.index(segment.modality), device=device)
                for segment in self.segments
            ]
        )

"""Sizes that heads are built from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSizes:
    """What an architecture says of itself to those who build heads on its streams.

    Attributes:
        widths: Width D of each stream that the architecture has (``visual``, ``text``, ``fused``, ``generation``),
            and of ``pooled`` where it makes that and it is not that of ``fused``.
        text_length: Token positions per text.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings; 0 where there are none.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per 3D patch.
    """

    widths: Mapping[str, int]
    text_length: int
    vocab_size: int
    projection_size: int
    patch_size: int
    tubelet_size: int

    @property
    def words(self) -> int:
        """Width of the streams on which words are predicted: the last one of the architecture's that reads words."""
        return next(self.widths[stream] for stream in ("generation", "fused", "text") if stream in self.widths)

    @property
    def pooled(self) -> int:
        """Width of what stands for a fused row as a whole, see ``State.pooled``."""
        return self.widths.get("pooled", self.widths["fused"])

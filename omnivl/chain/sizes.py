"""Sizes that heads are built from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of an architecture that are needed to build heads on its streams.

    Attributes:
        widths: Width D of each stream that the architecture has (``visual``, ``text``, ``fused``, ``generation``),
            and of ``pooled`` if it has that and its width is not that of ``fused``.
        text_length: Token positions per text.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings; 0 where there are none.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per 3D patch.
        image_size: Side of an image in pixels.
    """

    widths: Mapping[str, int]
    text_length: int
    vocab_size: int
    projection_size: int
    patch_size: int
    tubelet_size: int
    image_size: int

    @property
    def words(self) -> int:
        """Width of the stream on which words are predicted: the architecture's last one that reads words."""
        return next(self.widths[stream] for stream in ("generation", "fused", "text") if stream in self.widths)

    @property
    def pooled(self) -> int:
        """Width of the pooled representation of a fused row, see ``State.pooled``."""
        return self.widths.get("pooled", self.widths["fused"])

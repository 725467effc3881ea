"""What the page asks of a model: the methods of ``omnivl.Model`` that it uses.

Shapes: N pictures, clips or texts, M embeddings of a picture (architectures that make several of each), P projection
size.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from omnivl.api import Routing
from omnivl.data.decode import Pixels
from omnivl.inference.pictures import Media


class Model(Protocol):
    """A trained stage as the page uses it. Whatever it cannot do, it says in a ``UserError``.

    Pictures are uint8 arrays ``[H, W, 3]``, clips ``[T, H, W, 3]``.
    """

    def encode_image(self, images: Sequence[Pixels], batch_size: int = 32) -> Tensor:
        """Unit-length embeddings, fp32 ``[N, P]`` or ``[N, M, P]``."""

    def encode_video(self, clips: Sequence[Pixels], batch_size: int = 32) -> Tensor:
        """Unit-length embeddings, fp32 ``[N, P]`` or ``[N, M, P]``."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-length embeddings, fp32 ``[N, P]``."""

    def classify(
        self, pictures: Sequence[Pixels], labels: Sequence[str], *, media: Media = "image"
    ) -> list[list[tuple[str, float]]]:
        """For each picture or clip the labels with their probabilities, the likeliest first."""

    def caption(self, pictures: Sequence[Pixels], *, media: Media = "image") -> list[str]:
        """A caption of each picture or clip."""

    def routing(self, picture: Pixels | None = None, text: str | None = None, *, media: Media = "image") -> Routing:
        """The experts of each patch and word, layer by layer."""

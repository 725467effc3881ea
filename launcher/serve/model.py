"""What the page asks of a model, and what it makes of its routing.

Shapes: N pictures, clips or texts, D embedding size, T frames, H x W pixels, R rows and C columns of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

Picture = Image.Image
Clip = Sequence[Image.Image]

NOBODY = -1
"""The expert of a token that none took."""


@dataclass(frozen=True)
class RoutedWord:
    """A word with the expert that its token went to first."""

    word: str
    expert: int


@dataclass(frozen=True)
class RoutedLayer:
    """Where one layer sent the tokens of a picture, a clip or a text.

    Attributes:
        layer: Its name.
        num_experts: How many experts it has.
        patches: The first expert of each patch, ``[T][R][C]`` with one entry of T for each time position; ``NOBODY``
            where none took it. Empty for a text.
        words: The tokens of a text, in order. Empty for a picture or a clip.
    """

    layer: str
    num_experts: int
    patches: tuple[tuple[tuple[int, ...], ...], ...] = ()
    words: tuple[RoutedWord, ...] = ()


class Model(Protocol):
    """A trained stage as the page uses it. Whatever it cannot do, it says in a ``UserError``."""

    def encode_image(self, images: Sequence[Picture], batch_size: int = 32) -> Tensor:
        """Unit-length embeddings, fp32 ``[N, D]``."""

    def encode_video(self, clips: Sequence[Clip]) -> Tensor:
        """Unit-length embeddings, fp32 ``[N, D]``."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-length embeddings, fp32 ``[N, D]``."""

    def classify(self, pictures: Sequence[Picture | Clip], labels: Sequence[str]) -> list[list[tuple[str, float]]]:
        """For each picture or clip the labels with their probabilities, the likeliest first."""

    def caption(self, pictures: Sequence[Picture | Clip]) -> list[str]:
        """A caption of each picture or clip."""

    def routing(self, picture: Picture | Clip | None = None, text: str | None = None) -> Sequence[RoutedLayer]:
        """The experts of each patch and word, layer by layer."""

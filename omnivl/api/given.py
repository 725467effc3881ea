"""What the methods of a model are given: pictures and clips as sets of a batch, texts with a word, embeddings."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import Tokenizer
from omnivl.errors import DataError
from omnivl.inference.given import clip_view, each_clip, each_picture, empty_text, given_sample, picture_view
from omnivl.inference.pictures import Media, PictureSet

LEAST_SIDE = 8
"""Pixels of the shorter side of a picture. Smaller ones are tracking pixels and mistakes."""


def picture_sets(method: str, given: Any, media: Media, sizes: InputSizes, batch_size: int) -> Iterator[PictureSet]:
    """Pictures or clips as sets of at most ``batch_size``, each read when its turn comes.

    Args:
        method: Who asks, for messages.
        given: One or several; see ``omnivl.inference.given``.
        media: ``image`` or ``video``.
        sizes: Of the pictures and clips that are shown, as a rule those of the model's inputs.
        batch_size: Largest number of samples of a set.

    Raises:
        DataError: There are none, or one of them cannot be used.
    """
    moves, name = media == "video", "clips" if media == "video" else "pictures"
    numbered = enumerate(each_clip(given) if moves else each_picture(given))
    count = 0
    while batch := [*islice(numbered, batch_size)]:
        samples = []
        for place, one in batch:
            where = f"{name}[{place}]"
            if moves:
                view = clip_view(one, sizes.size_of_view(True), sizes.num_frames, where, LEAST_SIDE)
            else:
                view = picture_view(one, sizes.size_of_view(False), where, LEAST_SIDE)
            samples.append(given_sample(view, where))
        yield PictureSet.of(samples, media, sizes)
        count += len(batch)
    if not count:
        raise DataError(f"{method}: got no {name}; allowed is at least one; give one")


def check_words(tokenizer: Tokenizer, name: str, texts: Sequence[str]) -> None:
    """Refuses texts of which a tokenizer leaves nothing.

    Raises:
        DataError: There is one.
    """
    for place in (tokenizer.encode(texts, 3)[:, 1] == tokenizer.special.sep).nonzero()[0].tolist():
        raise empty_text(f"{name}[{place}]", texts[place])


def is_embedding(given: Any) -> bool:
    """Whether a value is an embedding or several: a tensor of floats."""
    return isinstance(given, Tensor) and given.is_floating_point() and given.dim() <= 3

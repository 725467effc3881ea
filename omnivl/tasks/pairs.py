"""Predictions for pairs of pictures and texts, in any number for each picture.

Shapes: N pictures, P pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet


def predict_pairs(
    encoder: Encoder, objective: str, pictures: PictureSet, texts: Sequence[str], shown: Tensor, said: Tensor
) -> Tensor:
    """Predictions of an objective's head for pairs, ``[P, ...]`` in their order.

    Pairs are computed by picture, so that a picture with many texts is not encoded for each of them.

    Args:
        encoder: A stage with the head.
        objective: Key of the head's objective.
        pictures: N pictures or clips.
        texts: The texts.
        shown: The picture of each pair, int64 ``[P]``, P at least 1.
        said: The text of each pair, int64 ``[P]``.
    """
    owner, order = shown.sort(stable=True)
    counts = torch.bincount(owner, minlength=len(pictures))
    width = -(-len(owner) // int((counts > 0).sum()))  # the mean number of pairs of a picture that has some
    rows = -(-counts // width)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    row, column = (rows.cumsum(0) - rows)[owner] + place // width, place % width
    sorted_texts = said[order]
    table = sorted_texts[column == 0, None].repeat(1, width)  # what is left over is the row's first text, and not read
    table[row, column] = sorted_texts
    repeated = pictures.chosen(torch.arange(len(pictures)).repeat_interleave(rows).tolist())
    found = encoder.predict(objective, repeated, texts, table)[row, column]
    return torch.empty_like(found).index_copy_(0, order, found)

"""Predictions for pairs of pictures and texts, in any number for each picture.

Shapes: N pictures, P pairs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
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
    mean = -(-len(owner) // int((counts > 0).sum()))  # pairs of a picture that has some
    width = min(mean, encoder.most_texts)  # many texts may find the same few pictures
    rows = -(-counts // width)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    row, column = (rows.cumsum(0) - rows)[owner] + place // width, place % width
    sorted_texts = said[order]
    table = sorted_texts[column == 0, None].repeat(1, width)  # what is left over is the row's first text, and not read
    table[row, column] = sorted_texts
    repeated = pictures.chosen(torch.arange(len(pictures)).repeat_interleave(rows).tolist())
    found = encoder.predict(objective, repeated, texts, table)[row, column]
    return torch.empty_like(found).index_copy_(0, order, found)


def located(
    encoder: Encoder, objective: str, pictures: PictureSet, texts: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    """The boxes of what the texts of each picture speak of, each ``[its texts, 4]``, maybe none.

    Left, top, right, bottom as fractions of the whole picture, of which the model's view may be a part.

    Args:
        encoder: A stage with the head.
        objective: Key of an objective of kind ``locate``.
        pictures: N pictures.
        texts: The texts of each.
    """
    flat = [text for own in texts for text in own]
    if not flat:
        return [np.empty((0, 4))] * len(texts)
    shown = torch.tensor([place for place, own in enumerate(texts) for _ in own])
    found = predict_pairs(encoder, objective, pictures, flat, shown, torch.arange(len(flat))).double()
    parts = torch.split(found, [len(own) for own in texts])
    return [pictures.placement(place).inverse().boxes(part.numpy())[0] for place, part in enumerate(parts)]

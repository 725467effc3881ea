"""Embeddings of a trained model as the vectors by which ``omnivl.data.overlap`` compares samples."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnivl.data.overlap import Vectors
from omnivl.data.sources.base import Sample
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, PictureSet


def embeddings_of(encoder: Encoder, media: Media) -> Vectors:
    """Makes vectors of samples by the model's visual embeddings, one or several for each.

    Args:
        encoder: The trained stage.
        media: ``image`` or ``video``.
    """

    def made(samples: Sequence[Sample]) -> Tensor:
        with torch.no_grad():
            return encoder.pictures(PictureSet.of(samples, media, encoder.model.inputs)).float()

    def vectors(samples: Sequence[Sample], test: bool) -> tuple[list[int], NDArray[np.float32]]:
        places = list(range(len(samples)))
        try:
            found = made(samples)
        except DataError:  # one of them cannot be read: those that can, one by one
            places, parts = [], []
            for place, sample in enumerate(samples):
                try:
                    parts.append(made([sample]))
                except DataError:
                    continue
                places.append(place)
            if not parts:
                return [], np.zeros((0, 1, 1), dtype=np.float32)
            found = torch.cat(parts)
        return places, found.reshape(len(places), -1, found.shape[-1]).numpy()

    return vectors

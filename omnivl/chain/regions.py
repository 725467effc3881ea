"""What is said of regions of pictures: the shared segments ``regions`` of the text stream and of the visual one.

A picture has 1 + K rows, one behind the other: its own text, about the whole of it, then up to K texts about boxes in
it, drawn anew each time. The picture is encoded once; ``omnivl.parts.regions`` makes the visual rows of its features.

Shapes: B samples, K regions of a picture, R = B * (1 + K) rows, M boxes of a sample's field, L text positions.

Source: Zeng et al., X-VLM, arXiv 2111.08276, sections 3.1 and 3.2. Its code also takes the caption as one of the texts.
Differs: pictures that show fewer regions have absent rows, which no loss counts; X-VLM's code repeats others there,
    which become false negatives.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from omnivl.chain.demands import REGIONS
from omnivl.chain.objective import PrepareContext
from omnivl.data.batch import Batch
from omnivl.data.fields import Field
from omnivl.randomness import stable_hash

MOST_BOXES = 256
"""M: the largest number of regions that a sample's field may have."""

BOXES = "region_boxes"

FIELDS: Mapping[str, Field] = {
    REGIONS: Field("text", most=MOST_BOXES),
    BOXES: Field("boxes", most=MOST_BOXES, as_many_as=REGIONS),
}
"""The fields that objectives on regions read: texts, and the box of each."""


def region_rows(batch_size: int, regions: int) -> int:
    """R; 0 where no regions are read."""
    return batch_size * (1 + regions) if regions else 0


def draw_regions(batch: Batch, context: PrepareContext, count: int) -> dict[str, Tensor]:
    """The rows of a batch.

    Args:
        batch: With ``FIELDS``.
        context: For the draw, and what texts are read with.
        count: K.

    Returns:
        ``regions/token_ids`` int64 ``[R, L]``; ``regions/boxes`` fp32 ``[R, 4]``, corners as fractions of the view, the
            whole of it for a picture's own text and for absent rows; ``regions/present`` bool ``[R]``;
            ``regions/located`` bool ``[R]``, those about a box; ``regions/identity`` int64 ``[R]``, equal for equal
            texts.
    """
    boxes, shown = batch.fields[BOXES], batch.fields[f"{BOXES}/present"]
    assert isinstance(boxes, Tensor), "boxes are collated"
    assert isinstance(shown, Tensor), "boxes are collated"
    rows = batch.size, 1 + count
    chosen = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(*rows, 1)
    present, texts = torch.zeros(rows, dtype=torch.bool), list[str]()
    order = np.argsort(context.uniforms(REGIONS, batch, MOST_BOXES), axis=1)
    for row, own in enumerate(batch.fields[REGIONS]):
        places = [place for place in order[row].tolist() if shown[row, place]][:count]
        said = [batch.captions[row], *(str(own[place]) for place in places)]
        chosen[row, 1 : len(said)] = boxes[row, places]
        present[row, : len(said)] = True
        texts += said + [""] * (rows[1] - len(said))
    located = present.clone()
    located[:, 0] = False
    return {
        f"{REGIONS}/token_ids": torch.from_numpy(context.readers["text"].encode(texts)),
        f"{REGIONS}/boxes": chosen.flatten(0, 1),
        f"{REGIONS}/present": present.flatten(),
        f"{REGIONS}/located": located.flatten(),
        f"{REGIONS}/identity": torch.tensor([stable_hash("region", text) for text in texts], dtype=torch.int64),
    }

"""A signature of a picture's pixels that needs no model: where and how its colours change, at 16 x 16 places.

Signatures compare by their cosine. What that finds is measured in docs/log.md: copies, also if encoded again, scaled,
stretched, darker or mirrored; not crops, and not grey copies of coloured pictures.

Source: the difference hash of D. Krawetz, hackerfactor.com, 2013 ("Kind of Like That").
Differs: differences stay numbers instead of signs, of three colours, in both directions. Signs of differences of flat
    areas are noise: on drawings they find half of the copies that were scaled.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.decode import decode_clip, decode_still
from omnivl.data.inspect_media import has_media, moves
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.sources.base import BadSampleError, Sample

SIDE = 16
WIDTH = 2 * 3 * SIDE * SIDE
VIEWS = ("whole", "mirrored")
"""What the two signatures of a test picture are of."""

THRESHOLD = 0.9
"""Cosine from which two pictures are taken for the same."""


def signature(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The signature of a picture, fp32 ``[WIDTH]``, of length 1; zeros for a picture of one colour.

    Args:
        pixels: uint8 ``[H, W, 3]``.
    """
    small = cv2.resize(pixels, (SIDE + 1, SIDE + 1), interpolation=cv2.INTER_AREA).astype(np.float32)
    down, right = np.diff(small, axis=0)[:, :-1], np.diff(small, axis=1)[:-1]
    values: NDArray[np.float32] = np.concatenate([down.ravel(), right.ravel()])
    length = float(np.linalg.norm(values))
    values *= 1.0 / length if length > 1.0 else 0.0
    return values


def signatures(samples: Sequence[Sample], test: bool) -> tuple[list[int], NDArray[np.float32]]:
    """Signatures of pictures, and of the middle frames of clips; see ``overlap.Vectors``.

    Args:
        samples: With pictures.
        test: Whether to give those of ``VIEWS``, else of the whole picture alone.
    """
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(_pixels, samples))
    places = [place for place, pixels in enumerate(found) if pixels is not None]
    views = [[one, one[:, ::-1]] if test else [one] for one in found if one is not None]
    made = [[signature(np.ascontiguousarray(view)) for view in own] for own in views]
    return places, np.array(made, dtype=np.float32).reshape(len(places), len(VIEWS) if test else 1, WIDTH)


def _pixels(sample: Sample) -> NDArray[np.uint8] | None:
    """A picture or the middle frame of a clip, uint8 ``[H, W, 3]``; None if it cannot be read."""
    try:
        if not has_media(sample):
            return None
        if moves(sample):
            frames = decode_clip(sample, DEFAULT_LIMITS, lambda total: [total // 2])
        else:
            frames = decode_still(sample, DEFAULT_LIMITS, needed=4 * SIDE)
    except BadSampleError:
        return None
    return np.asarray(frames[0])

"""Which frames of a clip become the model's frames.

Shapes: T frames, H x W pixels.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from omnivl.data.config import FrameSamplingConfig

ChooseFrames = Callable[[int], list[int]]
"""Number of frames of a clip -> frames wanted, in rising order; repeats are allowed."""

Whole = Callable[[int, int], bool]
"""Whether a clip is to be decoded whole, by its number of frames and the pixels of each."""


def sample_frames(
    total: int, num_frames: int, config: FrameSamplingConfig, random: np.random.Generator | None, place: float = 0.5
) -> list[int]:
    """Returns ``num_frames`` frame numbers in rising order; a short clip repeats some.

    The configured span is divided into ``num_frames`` equal segments. ``uniform`` takes the middle of each, ``segment``
    draws one frame from each.

    Args:
        total: Frames of the clip, at least 1.
        num_frames: Frames wanted.
        config: Mode and span.
        random: The sample's generator; None for evaluation, which is always uniform.
        place: In evaluation, where the span lies, from 0 (it begins with the clip) to 1 (it ends with it).

    Source: segment sampling, Wang et al., "Temporal Segment Networks" (arXiv 1608.00859), section 3.1.
    """
    assert total > 0, "a clip has frames"
    length = min(float(total), max(1.0, total * config.span))
    if length < num_frames <= total:
        length = float(num_frames)  # a longer span is preferred to repeated frames
    if random is None:
        start, offsets = (total - length) * place, np.full(num_frames, 0.5)
    else:
        start = random.random() * (total - length)
        offsets = random.random(num_frames) if config.mode == "segment" else np.full(num_frames, 0.5)
    places = start + (np.arange(num_frames) + offsets) * (length / num_frames)
    return [min(int(place), total - 1) for place in places]


def wanted_frames(total: int, size: tuple[int, int], choose: ChooseFrames, whole: Whole | None) -> list[int]:
    """The numbers of the frames wanted of a clip.

    Args:
        total: Its frames.
        size: (width, height) of each.
        choose: Which of them.
        whole: Whether to take all instead; None for never.
    """
    return list(range(total)) if whole is not None and whole(total, size[0] * size[1]) else choose(total)


def gather_frames(frames: dict[int, NDArray[np.uint8]], wanted: list[int]) -> NDArray[np.uint8]:
    """The frames ``[T, H, W, 3]`` in rising order, as wanted; each is let go once it is copied."""
    gathered: NDArray[np.uint8] = np.empty((len(wanted), *frames[wanted[0]].shape), dtype=np.uint8)
    for place, number in enumerate(wanted):
        gathered[place] = frames[number]
        if number not in wanted[place + 1 : place + 2]:
            del frames[number]
    return gathered

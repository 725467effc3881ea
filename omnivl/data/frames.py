"""Which frames of a clip become the model's frames."""

import numpy as np

from omnivl.data.config import FrameSamplingConfig


def sample_frames(
    total: int, num_frames: int, config: FrameSamplingConfig, random: np.random.Generator | None
) -> list[int]:
    """Returns ``num_frames`` frame numbers in rising order; a short clip repeats some.

    The configured span is divided into ``num_frames`` equal segments. ``uniform`` takes the middle of each, ``segment``
    draws one frame from each.

    Args:
        total: Frames of the clip, at least 1.
        num_frames: Frames wanted.
        config: Mode and span.
        random: The sample's generator; None for evaluation, which is always uniform and in the middle.

    Source: segment sampling, Wang et al., "Temporal Segment Networks" (arXiv 1608.00859), section 3.1.
    """
    assert total > 0, "a clip has frames"
    length = min(float(total), max(1.0, total * config.span))
    if length < num_frames <= total:
        length = float(num_frames)  # a longer span is preferred to repeated frames
    if random is None:
        start, offsets = (total - length) / 2, np.full(num_frames, 0.5)
    else:
        start = random.random() * (total - length)
        offsets = random.random(num_frames) if config.mode == "segment" else np.full(num_frames, 0.5)
    places = start + (np.arange(num_frames) + offsets) * (length / num_frames)
    return [min(int(place), total - 1) for place in places]

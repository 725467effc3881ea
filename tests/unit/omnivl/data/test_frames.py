import numpy as np
import pytest

from omnivl.data.config import FrameSamplingConfig
from omnivl.data.frames import sample_frames

UNIFORM, SEGMENT = FrameSamplingConfig("uniform"), FrameSamplingConfig("segment")


class Fixed:
    """A generator whose numbers are known."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self, size=None):
        return self.numbers.pop(0) if size is None else np.array([self.numbers.pop(0) for _ in range(size)])


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [
        (8, 4, [1, 3, 5, 7]),  # segments of 2, middles 1, 3, 5, 7
        (10, 4, [1, 3, 6, 8]),  # segments of 2.5, middles 1.25, 3.75, 6.25, 8.75
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [0, 0, 1, 1]),  # middles 0.25, 0.75, 1.25, 1.75
        (1, 3, [0, 0, 0]),
        (9, 1, [4]),  # the middle
    ],
)
def test_uniform_takes_the_middle_of_each_segment(total, wanted, expected):
    assert sample_frames(total, wanted, SEGMENT, None) == expected, "evaluation is uniform in every mode"
    assert sample_frames(total, wanted, UNIFORM, Fixed(0.9)) == expected, "with span 1 there is no start to draw"


def test_segment_draws_within_each_segment():
    # 10 frames, 4 segments of 2.5; offsets 0, 0.5, 0.99, 0.4 -> 0, 2.5 + 1.25, 5 + 2.475, 7.5 + 1.0
    assert sample_frames(10, 4, SEGMENT, Fixed(0.3, 0.0, 0.5, 0.99, 0.4)) == [0, 3, 7, 8]


def test_span_looks_at_a_part():
    # 100 frames, span 0.2 -> 20 frames; start 0.5 * 80 = 40; segments of 5: 42.5, 47.5, 52.5, 57.5
    config = FrameSamplingConfig("uniform", span=0.2)
    assert sample_frames(100, 4, config, Fixed(0.5)) == [42, 47, 52, 57]
    assert sample_frames(100, 4, config, Fixed(0.0)) == [2, 7, 12, 17]
    assert sample_frames(100, 4, config, None) == [42, 47, 52, 57]


def test_a_span_shorter_than_the_frames_wanted_is_widened():
    # span 0.1 of 20 frames is 2, but 8 frames are wanted and there: all different
    assert sample_frames(20, 8, FrameSamplingConfig("uniform", span=0.1), None) == [6, 7, 8, 9, 10, 11, 12, 13]


def test_any_draw_is_sorted_and_inside():
    random = np.random.default_rng(0)
    for _ in range(500):
        total, wanted = int(random.integers(1, 40)), int(random.integers(1, 20))
        config = FrameSamplingConfig("segment", span=float(random.uniform(0.05, 1)))
        frames = sample_frames(total, wanted, config, random)
        assert len(frames) == wanted
        assert frames == sorted(frames)
        assert 0 <= frames[0] <= frames[-1] < total

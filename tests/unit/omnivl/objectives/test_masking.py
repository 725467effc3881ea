import math
from typing import Any

import numpy as np
import pytest

from omnivl.objectives.masking import block_mask, bounded_count, clip_mask, frame_mask, over_patches
from omnivl.randomness import generator


class Scripted:
    """A generator whose draws are written down by the test."""

    def __init__(self, **draws: list[Any]) -> None:
        self.draws = {name: list(values) for name, values in draws.items()}

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.draws[name].pop(0)


def uniforms(*values: float) -> Scripted:
    """A generator of ``random`` whose first numbers are given; of a block: area, aspect, row, column."""
    return Scripted(random=[np.array(values)])


def aspect(value: float) -> float:
    """The uniform number that draws an aspect: 0 for 0.3, 1 for 1 / 0.3, linear in the logarithm."""
    return (math.log(value) - math.log(0.3)) / (2 * math.log(1 / 0.3))


def test_a_block_lies_where_it_was_drawn() -> None:
    # 0.25 * 16 = 4 patches. Area 4 (from 4 to 4), aspect 1: a square of side 2. Its corner can be in rows and columns
    # 0, 1, 2: a third each, so 0.34 is row 1 and 0.67 is column 2.
    mask = block_mask(uniforms(0.9, aspect(1), 0.34, 0.67), (4, 4), 0.25)
    assert mask.astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_a_block_follows_its_aspect() -> None:
    # On 8 x 8, 0.125 * 64 = 8. Area from 4 to 8, 0.5 of the way: 6. Aspect 3 (height over width): height
    # sqrt(18) = 4.24, so 4; width sqrt(2) = 1.41, so 1. Corners in rows 0 .. 4 and columns 0 .. 7: 0.2 is row 1, 0.9 is
    # column 7. Then 4 are left: area 4, aspect 1 / 3: height 1.15, so 1; width 3.46, so 3; rows 0 .. 7: 0.99 is row 7,
    # columns 0 .. 5: 0 is column 0. Then one patch: row 0, column 0.
    tall, flat, single = (0.5, aspect(3), 0.2, 0.9), (0.0, aspect(1 / 3), 0.99, 0.0), (0.0, aspect(1), 0.0, 0.0)
    mask = block_mask(uniforms(*tall, *flat, *single), (8, 8), 0.125)
    wanted = np.zeros((8, 8), dtype=bool)
    wanted[1:5, 7] = wanted[7, :3] = wanted[0, 0] = True
    assert np.array_equal(mask, wanted)


def test_blocks_that_do_not_fit_are_thrown_away_and_the_rest_is_filled_beside() -> None:
    # 0.375 * 16 = 6. First 2 x 2 at (0, 0); area from 4 to 6, none of the way. Then 2 are left, and ten squares of
    # side 1 (area 2, sqrt 1.41) at the very same place cover nothing new. Two patches are filled in beside: flat
    # candidates of the square are 2, 6, 8, 9; 0.1 of four is the first, 2; then candidates are 3, 6, 8, 9; 0.3 is 6.
    random = uniforms(*[0.0, aspect(1), 0.0, 0.0] * 11, 0.1, 0.3)
    mask = block_mask(random, (4, 4), 0.375)
    assert mask.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_filling_does_not_go_round_the_edge() -> None:
    # 1 x 1 at (1, 3) is the last patch of its row; 0.125 * 16 = 2, min_block 1. Area from 1 to 2: 1. Then ten misses.
    # Beside it lie 3, 6 and 11, not 8 (the first of the next row). 0.99 of three is the last one, 11.
    random = uniforms(*[0.0, aspect(1), 0.25, 0.99] * 11, 0.99)
    mask = block_mask(random, (4, 4), 0.125, min_block=1)
    assert np.flatnonzero(mask).tolist() == [7, 11]
    random = uniforms(*[0.0, aspect(1), 0.25, 0.0] * 11, 0.4)  # at (1, 0): beside it lie 0, 5 and 8, not 3
    assert np.flatnonzero(block_mask(random, (4, 4), 0.125, min_block=1)).tolist() == [4, 5]


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (4, 4), (14, 14), (3, 7)])
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.4, 0.75, 0.99])
def test_the_number_of_masked_patches_is_exact(grid: tuple[int, int], probability: float) -> None:
    size = grid[0] * grid[1]
    wanted = min(size - 1, max(1, round(probability * size)))
    for seed in range(20):
        assert block_mask(generator(seed), grid, probability).sum() == wanted


def test_blocks_hang_together_and_reach_every_patch() -> None:
    """Masked patches have far more masked neighbours than under independent masking, and no place is left out."""
    masks = np.stack([block_mask(generator("blocks", i), (14, 14), 0.4) for i in range(200)])
    pairs = (masks[:, 1:] & masks[:, :-1]).mean()
    assert pairs > 0.27  # independent masking: 0.4 * 0.4 = 0.16
    assert masks.mean(0).min() > 0.0


def test_bounded_count() -> None:
    assert [bounded_count(p, 10) for p in (0.01, 0.15, 0.26, 0.99)] == [1, 2, 3, 9]


def test_frames_are_masked_by_their_own_draw() -> None:
    # Below 0.15: the first and the third.
    random = Scripted(random=[np.array([0.1, 0.2, 0.14, 0.15])])
    assert frame_mask(random, 4, 0.15).tolist() == [True, False, True, False]


def test_at_least_one_frame_is_masked_and_one_is_left() -> None:
    none_drawn = Scripted(random=[np.ones(4)], integers=[2])
    assert frame_mask(none_drawn, 4, 0.15).tolist() == [False, False, True, False]
    all_drawn = Scripted(random=[np.zeros(4)], integers=[0])
    assert frame_mask(all_drawn, 4, 0.15).tolist() == [False, True, True, True]


def test_frame_share_is_near_the_probability() -> None:
    masks = np.stack([frame_mask(generator(i), 32, 0.15) for i in range(500)])
    assert abs(masks.mean() - 0.15) < 0.01
    assert masks.any(1).all()
    assert not masks.all(1).any()


def test_clips_are_runs_from_the_drawn_phase_on() -> None:
    # Length 3, phase 1: position t lies in clip (t + 1) // 3, so clips are {0, 1}, {2, 3, 4}, {5, 6, 7}.
    # Draws below 0.15: the second clip.
    random = Scripted(integers=[1], random=[np.array([0.9, 0.1, 0.5])])
    assert clip_mask(random, 8, 0.15, 3).tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize(("times", "clip_length"), [(2, 2), (3, 4), (8, 2), (8, 4), (32, 4), (7, 3)])
def test_some_clip_is_masked_and_some_left(times: int, clip_length: int) -> None:
    for seed in range(50):
        mask = clip_mask(generator(seed), times, 0.15, clip_length)
        assert mask.shape == (times,)
        assert 0 < mask.sum() < times


def test_inner_clips_have_their_full_length() -> None:
    length = 4
    for seed in range(50):
        mask = clip_mask(generator(seed), 32, 0.15, length)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
        for start, end in edges.reshape(-1, 2):
            if start > 0 and end < 32:
                assert (end - start) % length == 0


def test_over_patches_repeats_for_every_patch() -> None:
    assert over_patches(np.array([True, False]), (1, 3)).tolist() == [[True] * 3, [False] * 3]

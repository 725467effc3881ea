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


def test_a_block_lies_where_it_was_drawn() -> None:
    # 0.25 * 16 = 4 patches. Area 4, aspect exp(0) = 1: a square of side 2, its corner at row 1, column 2.
    random = Scripted(uniform=[4.0, 0.0], integers=[1, 2])
    mask = block_mask(random, (4, 4), 0.25)
    assert mask.astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_a_block_follows_its_aspect() -> None:
    # Area 4, aspect 4 (height over width): height sqrt(4 * 4) = 4, width sqrt(4 / 4) = 1.
    random = Scripted(uniform=[4.0, math.log(4.0)], integers=[0, 3])
    assert block_mask(random, (4, 4), 0.25).astype(int).tolist() == [[0, 0, 0, 1]] * 4


def test_blocks_that_do_not_fit_are_thrown_away_and_the_rest_is_filled_beside() -> None:
    # 0.375 * 16 = 6. First 2 x 2 at (0, 0); then ten tries at the very same place cover nothing new. Two patches are
    # filled in beside: flat candidates of the square are 2, 6, 8, 9; take 2, then candidates are 3, 6, 8, 9; take 6.
    random = Scripted(uniform=[4.0, 0.0] * 11, integers=[0, 0] * 11, choice=[2, 6])
    mask = block_mask(random, (4, 4), 0.375)
    assert mask.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


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

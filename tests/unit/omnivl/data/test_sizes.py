import time

import numpy as np
import pytest

from omnivl.data.sizes import PictureSizes

SIZES = PictureSizes(image_size=224, video_size=112, num_frames=8, patch_size=16, tubelet_size=1, native=True)


def grids(*pictures: tuple[int, int], clips: bool = False) -> list[list[int]]:
    return SIZES.grids(clips, np.array(pictures, dtype=np.int64)).tolist()


def test_grids_by_hand():
    assert grids((224, 224), (32, 48), (160, 96)) == [[14, 14], [3, 2], [6, 10]]  # rows, columns
    assert grids((640, 480)) == [[12, 16]]  # 192 of at most 196 patches
    assert grids((4, 4), (1, 100)) == [[1, 1], [6, 1]]
    assert grids((100_000, 10)) == [[1, 196]]
    assert grids((0, 0), (0, 5)) == [[14, 14], [14, 14]]  # not known
    assert grids((640, 480), (640, 640), clips=True) == [[6, 8], [7, 7]]


def test_a_grid_keeps_the_ratio_and_has_few_enough_patches():
    random = np.random.default_rng(0)
    pictures = np.exp(random.normal(6, 1, (5000, 2))).astype(np.int64) + 1
    found = SIZES.grids(False, pictures)
    assert found.min() >= 1
    assert found.prod(axis=1).max() <= 196
    large = pictures.prod(axis=1) > 224**2
    assert (found.prod(axis=1)[large] > 150).mean() > 0.95  # what is allowed is used
    ratio = pictures[:, 0] / pictures[:, 1]
    moderate = (ratio > 1 / 3) & (ratio < 3) & large
    off = found[:, 1] / found[:, 0] / ratio
    assert np.abs(np.log(off[moderate])).max() < np.log(1.2)
    small = pictures.max(axis=1) < 120
    assert np.abs(found[small] * 16 - pictures[small, ::-1]).max() <= 16  # none is enlarged beyond a patch


def test_a_picture_of_an_extreme_ratio_takes_no_time():
    start = time.perf_counter()
    assert grids((400_000_000, 1)) == [[1, 196]]
    assert time.perf_counter() - start < 0.05  # seconds; patch by patch it was 11
    assert grids((1, 400_000_000), (2**31 - 1, 0), (2**31 - 1, 2**31 - 1)) == [[196, 1], [14, 14], [14, 14]]


@pytest.mark.parametrize("clips", [False, True])
def test_pictures_are_taken_one_by_one(clips):
    pictures = np.random.default_rng(1).integers(1, 3000, (50, 2))
    together = SIZES.grids(clips, pictures)
    assert [grids(tuple(one), clips=clips)[0] for one in pictures.tolist()] == together.tolist()


def test_stretched_views_are_squares_of_whole_pictures():
    sizes = PictureSizes(image_size=32, video_size=16, num_frames=2, patch_size=8, tubelet_size=1, stretched=True)
    for moves, side in ((False, 32), (True, 16)):
        size = sizes.size_of_view(moves)
        assert not isinstance(size, int)
        assert size(640, 480) == size(1, 900) == (side, side)

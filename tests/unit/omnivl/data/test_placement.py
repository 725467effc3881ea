"""Boxes and masks follow the view: by hand, and against where a painted rectangle is seen."""

import numpy as np
import pytest

from omnivl.data.augment import TrainingDraw, evaluation_view, training_view
from omnivl.data.config import AugmentConfig
from omnivl.data.placement import Placement, crop_placement, mirror
from omnivl.data.rand_augment import WARPS, apply_operation

WHOLE = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)


def close(found: np.ndarray, wanted: list[list[float]]) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_crop_and_a_mirror_by_hand():
    # a picture of 40 x 20; the crop is columns 10 .. 29 and rows 5 .. 14
    place = crop_placement(10, 5, 20, 10, (40, 20))
    boxes = np.array(
        [
            [0.5, 0.5, 0.75, 0.75],  # pixels 20..30, 10..15; the crop's right lower quarter: inside
            [0.125, 0.25, 0.5, 0.75],  # pixels 5..20 x 5..15, of which 10..20, two thirds, are seen
            [0.0, 0.0, 0.375, 1.0],  # pixels 0..15 x 0..20: 5 x 10 of 15 x 20, a sixth
            [0.125, 0.25, 0.375, 0.75],  # pixels 5..15: exactly half
        ]
    )
    found, kept = place.boxes(boxes)
    assert kept.tolist() == [True, True, False, True]
    close(found, [[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [0.0] * 4, [0.0, 0.0, 0.25, 1.0]])
    mirrored, _ = place.then(mirror).boxes(boxes[:2])
    close(mirrored, [[0.0, 0.5, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])


def test_no_box_is_no_trouble():
    found, kept = Placement().boxes(np.zeros((0, 4)))
    assert found.shape == (0, 4)
    assert kept.shape == (0,)


def test_a_quarter_turn_by_hand():
    """90 degrees about the middle: what stood to the right of the middle is seen above it."""

    class Always(np.random.Generator):
        def random(self, size=None, *rest):  # type: ignore[override]
            return np.full(size, 1.0 - 1e-12)

    config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, rotate=90.0)
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    view = training_view(pixels, 16, config, Always(np.random.PCG64(0)), flip_allowed=False)
    found, kept = view.place.boxes(np.array([[0.75, 0.25, 1.0, 0.5]]))
    assert kept.all()
    np.testing.assert_allclose(found, [[0.25, 0.0, 0.5, 0.25]], atol=1e-9)


def test_the_middle_of_a_wide_picture_by_hand():
    view = evaluation_view(np.zeros((1, 20, 40, 3), np.uint8), 10)
    # columns 10 .. 29 are seen
    close(view.place.boxes(np.array([[0.25, 0.0, 0.5, 1.0]]))[0], [[0.0, 0.0, 0.5, 1.0]])


def test_the_whole_of_a_wide_picture_stretched_by_hand():
    """Boxes and masks keep their fractions; two columns of pixels become one."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (1, 20, 40, 3), dtype=np.uint8)
    view = evaluation_view(pixels, (20, 20))
    means = pixels[0].reshape(20, 20, 2, 3).mean(axis=2)
    assert np.abs(view.pixels[0] - means).max() <= 0.5
    box = np.array([[0.0, 0.0, 0.2, 1.0]])
    close(view.place.boxes(box)[0], box)
    assert not evaluation_view(pixels, 20).place.boxes(box)[1].any(), "the middle square does not show it"
    mask = np.zeros((20, 40), dtype=bool)
    mask[5:10, 10:20] = True
    assert np.array_equal(view.place.mask(mask, 20), np.pad(np.ones((5, 5), dtype=bool), ((5, 10), (5, 10))))


def painted(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A black picture with a white rectangle, its box and its mask."""
    pixels = np.zeros((1, height, width, 3), np.uint8)
    pixels[:, 30:60, 40:80] = 255
    mask = pixels[0, :, :, 0] > 0
    return pixels, np.array([[40 / width, 30 / height, 80 / width, 60 / height]]), mask


@pytest.mark.parametrize("change", [{}, {"rotate": 25.0, "zoom": (0.7, 1.2)}, {"rand_augment_operations": 3}])
@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_painted_is_seen_where_box_and_mask_say(change, stretched, seed):
    pixels, box, mask = painted(96, 128)
    config = AugmentConfig(crop_scale=(1.0, 1.0) if stretched else (0.8, 1.0), flip=0.5, **change)
    view = training_view(pixels, (64, 64), config, np.random.default_rng(seed), flip_allowed=True, stretched=stretched)
    seen = view.pixels[0].min(axis=2) > 127
    moved = view.place.mask(mask, 64)
    if change.get("rand_augment_operations") is None:
        rim = moved ^ seen
        assert rim.sum() <= 0.03 * max(seen.sum(), 1) + 4, "they differ at the blended rim only"
    boxes, kept = view.place.boxes(box)
    if kept[0] and moved.any():
        rows, columns = np.nonzero(moved)
        outer = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        np.testing.assert_allclose(boxes[0], outer, atol=1.1 / 64)


@pytest.mark.parametrize("change", [{}, {"rotate": 25.0, "zoom": (0.7, 1.2)}])
@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_a_shrunk_picture_is_seen_as_the_whole_one(change, shrink, seed):
    """Its sides are no multiples, so that its last pixels stand for less."""
    whole = (1203, 901)
    across = np.linspace(0, 255, whole[0])[None, :, None] * np.array([1.0, 0.0, 0.0])
    down = np.linspace(0, 255, whole[1])[:, None, None] * np.array([0.0, 1.0, 0.0])
    pixels = np.rint(across + down).astype(np.uint8)[None]
    smaller = pixels[:, shrink // 2 :: shrink, shrink // 2 :: shrink]
    lacking = [-(-side // shrink) - got for side, got in zip(whole[::-1], smaller.shape[1:3], strict=True)]
    smaller = np.pad(smaller, ((0, 0), (0, lacking[0]), (0, lacking[1]), (0, 0)), "edge")
    config = AugmentConfig(crop_scale=(0.5, 1.0), flip=0.5, **change)
    views = []
    for shown, by in ((pixels, 1), (smaller, shrink)):
        draw = TrainingDraw(config, np.random.default_rng(seed), flip_allowed=True)
        views.append(draw.view(shown, 64, by, whole))
    first, second = (view.pixels.astype(int) for view in views)
    assert np.abs(first - second).max() <= 2 + 255 * shrink / 900, "by a pixel of the smaller one at most"
    box = np.array([[0.3, 0.3, 0.6, 0.6]])
    np.testing.assert_allclose(views[0].place.boxes(box)[0], views[1].place.boxes(box)[0], atol=2 * shrink / 600)


@pytest.mark.parametrize("name", list(WARPS))
@pytest.mark.parametrize("seed", range(4))
def test_each_warp_moves_the_points_as_it_moves_the_pixels(name, seed):
    pixels, _, mask = painted(128, 128)
    changed, moved = apply_operation(name, pixels, 0.6, np.random.default_rng(seed))
    difference = (changed[0, :, :, 0] > 127) ^ Placement(moved).mask(mask, 128)
    assert difference.mean() < 0.01

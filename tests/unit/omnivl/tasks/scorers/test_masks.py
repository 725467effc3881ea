"""Scores of masks, worked out by hand, and compared with COCO's own tools."""

import numpy as np
import pytest

from omnivl.tasks.scorers.boxes import iou
from omnivl.tasks.scorers.masks import ious, mask_scores, overlap, run_lengths


def test_overlap_counts_pixels_of_whatever_is_not_zero() -> None:
    predicted, truth = np.array([[1, 1, 0], [0, 0, 0]]), np.array([[255, 0, 0], [255, 0, 0]], dtype=np.uint8)
    assert overlap(predicted, truth) == (1, 3)
    assert overlap(predicted, np.zeros((2, 3))) == (0, 2)


def test_large_objects_count_more_in_the_overall_iou() -> None:
    scores = mask_scores(np.array([1, 90]), np.array([2, 100]))
    assert scores["mIoU"] == pytest.approx((0.5 + 0.9) / 2)
    assert scores["oIoU"] == pytest.approx(91 / 102)
    # 0.5 and 0.9 themselves are enough.
    assert [scores[f"P@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == [1.0, 0.5, 0.5, 0.5, 0.5]


def test_two_empty_masks_have_an_iou_of_zero() -> None:
    assert ious(np.array([0, 2]), np.array([0, 2])).tolist() == [0.0, 1.0]
    assert mask_scores(np.array([0]), np.array([0])) == {
        **{"mIoU": 0.0, "oIoU": 0.0},
        **{f"P@{t}": 0.0 for t in (0.5, 0.6, 0.7, 0.8, 0.9)},
    }


def blots(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random mask: noise, rectangles, nothing, everything."""
    match int(random.integers(4)):
        case 0:
            return random.random((height, width)) < random.random()
        case 1:
            mask = np.zeros((height, width), dtype=bool)
            top, left = int(random.integers(height)), int(random.integers(width))
            mask[top : top + 1 + int(random.integers(height)), left : left + 1 + int(random.integers(width))] = True
            return mask
        case other:
            return np.full((height, width), other == 3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' own arrays
@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_and_ious_are_those_of_pycocotools(seed: int) -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools, of the development requirements")
    random = np.random.default_rng(seed)
    height, width = (int(one) for one in random.integers(1, 40, size=2))
    masks = [blots(random, height, width) for _ in range(6)]
    encoded = coco.encode(np.asfortranarray(np.stack(masks, axis=2).astype(np.uint8)))
    for mask, theirs in zip(masks, encoded, strict=True):
        ours = run_lengths(mask)
        compressed = coco.frPyObjects(ours, height, width)
        assert compressed["counts"] == theirs["counts"] and compressed["size"] == theirs["size"]
        assert np.array_equal(coco.decode(compressed) > 0, mask)
        assert sum(ours["counts"]) == height * width and sum(ours["counts"][1::2]) == int(coco.area(theirs))
    counted = np.array([[overlap(one, other) for other in masks] for one in masks])
    ours_of_pairs = ious(counted[..., 0], counted[..., 1])
    theirs_of_pairs = coco.iou(encoded, encoded, [0] * len(masks))
    some = np.array([mask.any() for mask in masks])
    either = some[:, None] | some[None, :]
    np.testing.assert_allclose(ours_of_pairs[either], theirs_of_pairs[either], rtol=1e-12)
    assert (ours_of_pairs[~either] == 0).all(), "of two empty masks, where pycocotools has no number"


def test_boxes_of_masks_overlap_as_pycocotools_says() -> None:
    """The plain IoU of boxes, which pycocotools has as left, top, width, height."""
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools, of the development requirements")
    boxes = np.random.default_rng(0).integers(1, 50, size=(60, 4)).astype(np.float64)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    theirs = coco.iou(boxes, boxes, [0] * len(boxes))
    np.testing.assert_allclose(iou(corners[:, None], corners), theirs, rtol=1e-12)

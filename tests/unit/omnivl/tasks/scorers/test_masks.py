"""Scores of masks, worked out by hand."""

import numpy as np
import pytest

from omnivl.tasks.scorers.masks import ious, mask_scores, overlap


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

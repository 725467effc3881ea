"""IoU, accuracy of boxes, recall of phrases."""

import math

import numpy as np
import pytest

from omnivl.tasks.scorers.boxes import iou, is_right, merged, phrase_ranks
from omnivl.tasks.scorers.recall import recalls


@pytest.mark.parametrize(
    ("box", "other", "plain", "inclusive"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0, 1.0),
        # Plain: 1 x 2 of 4 + 4 - 2. Inclusive: widths of 3, 2 x 3 of 9 + 9 - 6.
        ([0, 0, 2, 2], [1, 0, 3, 2], 2 / 6, 6 / 12),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0.0, 3 / 15),  # they touch: a column of pixels in common
        ([0, 0, 2, 2], [3, 0, 4, 2], 0.0, 0.0),  # neighbours: none
        ([0, 0, 2, 2], [9, 9, 11, 11], 0.0, 0.0),  # apart on both axes: no product of two negative sides
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0, 1.0),  # a point, and a pixel
        ([2, 2, 0, 0], [0, 0, 2, 2], 0.0, 0.0),  # right left of left
    ],
)
def test_iou(box: list[float], other: list[float], plain: float, inclusive: float) -> None:
    assert iou(box, other) == pytest.approx(plain)
    assert iou(other, box) == pytest.approx(plain)
    assert iou(box, other, inclusive=True) == pytest.approx(inclusive)


def test_iou_is_broadcast() -> None:
    boxes, others = np.array([[0, 0, 2, 2], [1, 0, 3, 2]]), np.array([[0, 0, 2, 2], [0, 0, 1, 1], [5, 5, 6, 6]])
    found = iou(boxes[:, None], others)
    assert found.tolist() == [pytest.approx([1.0, 1 / 4, 0.0]), pytest.approx([2 / 6, 0.0, 0.0])]


def of_refer(first: list[int], second: list[int]) -> float:
    """The rule of refer, of boxes [left, top, width, height]."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right = min(first[0] + first[2] - 1, second[0] + second[2] - 1)
    bottom = min(first[1] + first[3] - 1, second[1] + second[3] - 1)
    inside = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return inside / (first[2] * first[3] + second[2] * second[3] - inside)


def test_the_iou_of_refer_is_the_plain_one_but_for_overlaps_of_a_pixel() -> None:
    random = np.random.default_rng(0)
    thin = 0
    for first, second in random.integers(1, 12, size=(500, 2, 4)).tolist():
        ours = iou(*([left, top, left + width, top + height] for left, top, width, height in (first, second)))
        sides = [
            min(first[axis] + first[axis + 2], second[axis] + second[axis + 2]) - max(first[axis], second[axis])
            for axis in (0, 1)
        ]
        if min(sides) == 1:
            thin += 1
            assert of_refer(first, second) == 0 < ours
        else:
            assert of_refer(first, second) == pytest.approx(float(ours))
    assert thin > 10


def test_half_an_overlap_is_enough() -> None:
    # [0, 0, 2, 1] in [0, 0, 4, 1]: 2 of 4.
    assert is_right([[0, 0, 2, 1], [0, 0, 1.9, 1]], [[0, 0, 4, 1]] * 2).tolist() == [True, False]
    assert is_right([[0, 0, 2, 1]], [[0, 0, 4, 1]], threshold=0.6).tolist() == [False]


def test_merged_boxes() -> None:
    assert merged([[2, 3, 4, 5], [0, 4, 3, 9]]).tolist() == [[0, 3, 4, 9]]


TWO = [[0, 0, 1, 1], [9, 0, 10, 1]]


def test_protocols_of_phrases_with_several_boxes_differ() -> None:
    one_of_them, around = [0, 0, 1, 1], [0, 0, 10, 1]
    assert phrase_ranks([[one_of_them, around]], [TWO]).tolist() == [1]
    assert phrase_ranks([[one_of_them, around]], [TWO], merge=True).tolist() == [2]
    assert phrase_ranks([[around]], [TWO]).tolist() == [math.inf]


def test_half_an_overlap_is_enough_for_a_phrase() -> None:
    assert phrase_ranks([[[0, 0, 2, 1]], [[0, 0, 1.9, 1]]], [[[0, 0, 4, 1]]] * 2).tolist() == [1, math.inf]


def test_phrases_without_boxes_are_not_scored_and_phrases_without_predictions_are_missed() -> None:
    hit, miss = [0, 0, 1, 1], [5, 5, 6, 6]
    ranked = [[hit], [], [miss] * 5 + [hit], [miss, hit]]
    ranks = phrase_ranks(ranked, [[], TWO, TWO, TWO])
    assert ranks.tolist() == [math.inf, 6, 2]
    assert recalls(ranks) == {1: 0.0, 5: pytest.approx(1 / 3), 10: pytest.approx(2 / 3)}

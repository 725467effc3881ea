"""Grounded captions' F1, worked out by hand."""

import pytest

from omnivl.errors import DataError
from omnivl.tasks.scorers.grounded import GroundedCaption, GroundedReference, grounded_scores

HERE, THERE = (0, 0, 9, 9), (50, 50, 59, 59)


def test_precision_and_recall_are_means_over_classes() -> None:
    references = {
        "1": [GroundedReference(("man", "dog"), (HERE, THERE)), GroundedReference(("man",), (HERE,), {"hat"})],
        "2": [GroundedReference(("dog", "cat"), (HERE, THERE))],
    }
    written = {
        "1": GroundedCaption(("man", "dog", "hat"), (HERE, HERE, THERE)),
        "2": GroundedCaption(("dog", "sky"), (HERE, HERE)),
    }
    found = grounded_scores(references, written)
    # Classes: man, dog, cat. Precision of all: man 1, 1; dog 0 (another place), 0 (the second sentence lacks it), 1;
    # cat -; hat and sky belong to no class. Of loc: man 1, 1; dog 0, 1.
    assert found["precision_all"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["precision_loc"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    # Recall of all: man 1, 1; dog 0, 1; cat 0. Of loc cat does not count, but its class does.
    assert found["recall_all"] == found["recall_loc"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    p, r = found["precision_all"], found["recall_all"]
    assert found["F1_all"] == pytest.approx(2 * p * r / (p + r))
    assert found["F1_loc"] == pytest.approx(1 / 2)


def test_a_word_that_the_reference_says_without_a_box_is_not_held_against_the_caption() -> None:
    dog = GroundedReference(("dog",), (HERE,))
    hats = GroundedReference(("hat",), (HERE,))
    written = {"1": GroundedCaption(("dog", "hats"), (HERE, THERE)), "2": GroundedCaption(("hats",), (HERE,))}

    def precision(unboxed: set[str], lemmas: dict[str, str]) -> float:
        first = GroundedReference(dog.classes, dog.boxes, unboxed)
        second = GroundedReference(("hats",), hats.boxes)
        return grounded_scores({"1": [first], "2": [second]}, written, lemmas)["precision_all"]

    assert precision(set(), {}) == pytest.approx((1 + 1 / 2) / 2)
    assert precision({"hat"}, {}) == pytest.approx((1 + 1 / 2) / 2)
    assert precision({"hat"}, {"hats": "hat"}) == 1.0


def test_of_several_objects_of_a_class_the_first_counts() -> None:
    references = {"1": [GroundedReference(("man", "man"), (HERE, THERE))]}
    found = grounded_scores(references, {"1": GroundedCaption(("man", "man"), (HERE, THERE))})
    assert found["precision_all"] == 1 / 2, "both boxes against the first"
    assert found["recall_all"] == 1 / 2, "the caption's first box against both"


def test_pictures_without_a_caption_are_missed_and_bring_no_class() -> None:
    references = {"1": [GroundedReference(("man",), (HERE,))], "2": [GroundedReference(("man", "cat"), (HERE, HERE))]}
    found = grounded_scores(references, {"1": GroundedCaption(("man",), (HERE,))})
    assert found["precision_all"] == 1.0
    assert found["recall_all"] == found["recall_loc"] == 1 / 2


def test_half_an_overlap_is_not_enough() -> None:
    """Inclusive pixels: 10 x 10 within 10 x 20 is exactly 1/2, and 100 of 190 more, where 81 of 162 would not be."""
    references = {"1": [GroundedReference(("man",), ((0, 0, 9, 19),))]}
    assert grounded_scores(references, {"1": GroundedCaption(("man",), ((0, 0, 9, 9),))})["F1_all"] == 0.0
    references = {"1": [GroundedReference(("man",), ((0, 0, 9, 18),))]}
    assert grounded_scores(references, {"1": GroundedCaption(("man",), ((0, 0, 9, 9),))})["F1_all"] == 1.0


def test_without_objects_there_is_no_score() -> None:
    with pytest.raises(DataError, match="no picture with a caption has an object in its references"):
        grounded_scores({"1": [GroundedReference(("man",), (HERE,))]}, {})

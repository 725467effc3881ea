"""VQA's score against cases worked out by hand from the official rules."""

import pytest

from omnivl.tasks.scorers.vqa import best_constant, normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("people", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # one is left out once and then 0 others agree, nine times 1 / 3: 0.9 * 1 / 3
        (2, 0.6),  # twice 1 / 3, eight times 2 / 3: (2 / 3 + 16 / 3) / 10
        (3, 0.9),  # three times 2 / 3, seven times 1: (2 + 7) / 10
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_each_of_ten_people_is_left_out_in_turn(people: int, expected: float) -> None:
    given = ["cat"] * people + [f"dog {number}" for number in range(10 - people)]
    assert vqa_accuracy("cat", given) == pytest.approx(expected)


@pytest.mark.parametrize(("number", "expected"), [(1, 0.0), (2, 1 / 3), (3, 2 / 3), (4, 1.0)])
def test_fewer_people_score_by_the_same_definition(number: int, expected: float) -> None:
    assert vqa_accuracy("cat", ["cat"] * number) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("the red car", "red car"),
        ("An apple", "apple"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("yall", "y'all"),
        ("couldn'tve", "couldn't've"),
        ("x-ray", "x ray"),  # a mark between letters becomes a space
        ("yes, it is", "yes it is"),  # beside a space it vanishes
        ("1,000", "1000"),  # within a number it vanishes as well
        ("1,000 men/women", "1000 menwomen"),  # and then so do all marks of the answer
        ("3.5 meters.", "3.5 meters"),
        ("coca-cola!", "coca cola"),
        ("dogs' tails", "dogs' tails"),  # an apostrophe is no punctuation
        ("", ""),
    ],
)
def test_answers_are_compared_in_one_spelling(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_spelling_is_made_alike_only_where_people_disagree() -> None:
    assert vqa_accuracy("2", ["two"] * 10) == 0.0
    assert vqa_accuracy("2", ["two"] * 9 + ["many"]) == 1.0
    assert vqa_accuracy("The Car", ["car"] * 4 + ["a van"] * 6) == 1.0
    assert vqa_accuracy("van", ["car"] * 4 + ["a van"] * 6) == 1.0
    assert vqa_accuracy(" cat\n", ["cat"] * 10) == 1.0, "ends of lines and spaces around go in any case"


def test_the_best_constant_answer_is_that_of_the_best_mean_score() -> None:
    # yes: 1, 0.9 and 0; no: 0, 1 and 1; red: 0.
    asked = [["yes"] * 10, ["yes"] * 3 + ["no"] * 7, ["no"] * 4 + ["red", "blue", "black", "white", "grey", "green"]]
    assert best_constant(asked) == ("no", pytest.approx(2 / 3))
    assert best_constant(asked[:2]) == ("yes", pytest.approx(0.95))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("somebody'd", "somebodyd"),  # the official table's slip
        ("ive", "ive"),  # its entries with capitals never match words in lower case
        ("lets", "lets"),
        ("." * 40, "." * 8),  # it takes off at most 32 periods
        ("a man's", "man's"),
    ],
)
def test_oddities_of_the_official_program_are_kept(answer: str, expected: str) -> None:
    assert normalised(answer) == expected

"""GQA's scores on six questions, worked out by hand."""

from dataclasses import replace

import pytest

from omnivl.errors import DataError
from omnivl.tasks.scorers.gqa import Choices, GQAQuestion, consistencies, distribution, gqa_scores, is_right

QUESTIONS = {
    "1": GQAQuestion("red", "query", "attr", group="color", entailed=("1", "2", "6")),
    "2": GQAQuestion("yes", "verify", "attr", entailed=("1",)),
    "3": GQAQuestion("blue", "query", "attr", group="color", entailed=("4",)),
    "4": GQAQuestion("left", "choose", "rel", group="side"),
    "5": GQAQuestion("color", "compare", "attr", detailed="twoCommon"),
    "6": GQAQuestion("no", "verify", "obj", balanced=False),
}
PREDICTED = {"1": "red", "2": "yes", "3": "red", "4": "left", "5": "shape", "6": "yes"}
CHOICES = {
    "1": Choices(["red", "blue"], ["red"]),
    "2": Choices(["yes", "no"], ["yes", "no"]),
    "3": Choices(["red", "blue"], ["blue"]),
    "4": Choices(["right"], ["right"]),
    "5": Choices(["color"], []),
}


def test_all_scores() -> None:
    found = gqa_scores(QUESTIONS, PREDICTED, CHOICES, consistency=True)
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,  # 1, 2 and 4 of the five balanced ones; 6 is not balanced
            "open": 1 / 2,  # 1 and 3
            "binary": 2 / 3,  # 2, 4 and 5
            "structural: query": 1 / 2,
            "structural: verify": 1.0,
            "structural: choose": 1.0,
            "structural: compare": 0.0,
            "semantic: attr": 2 / 4,
            "semantic: rel": 1.0,
            # 1 entails 2 (right) and 6 (wrong), itself not counted: 1/2. 2 entails 1, right: 1. 3 is wrong; 4 entails
            # none.
            "consistency": 3 / 4,
            "validity": 4 / 5,  # 4's "left" is not among its choices; 5 has color, material and shape
            "plausibility": 3 / 5,  # 1, 2 and 5
            # color: right red 1, blue 1; predicted red 2: (2-1)^2/1 + (0-1)^2/1 = 2. side: 0. (2 * 2 + 1 * 0) / 3.
            "distribution": 4 / 3 / 100,
        }
    )


def test_a_score_of_no_question_is_left_out() -> None:
    found = gqa_scores({"2": QUESTIONS["2"]}, PREDICTED)
    assert found == {"accuracy": 1.0, "binary": 1.0, "structural: verify": 1.0, "semantic: attr": 1.0}
    alone = {"4": QUESTIONS["4"]}
    assert "consistency" not in gqa_scores(alone, PREDICTED, consistency=True), "it entails nothing"


def test_answers_match_exactly() -> None:
    assert not is_right({"1": QUESTIONS["1"]}, {"1": "Red"})["1"]
    assert not is_right({"1": QUESTIONS["1"]}, {"1": "the red"})["1"]


def test_answers_that_are_right_nowhere_in_a_group_add_nothing_to_the_distribution() -> None:
    questions = {str(number): GQAQuestion("a", "query", "attr", group="g") for number in range(4)}
    # Right: a 4. Predicted: a 1, b 3. (1 - 4)^2 / 4 = 9 / 4; b has no expected count.
    assert distribution(questions, {"0": "a", "1": "b", "2": "b", "3": "b"}) == pytest.approx(9 / 4 / 100)
    assert distribution({"0": replace(questions["0"], group=None)}, {"0": "a"}) is None


def test_unbalanced_questions_count_neither_for_the_distribution_nor_need_a_prediction() -> None:
    questions = {"1": QUESTIONS["4"], "2": replace(QUESTIONS["4"], balanced=False)}
    assert distribution(questions, {"1": "left"}) == 0.0
    assert gqa_scores(questions, {"1": "left"})["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("questions", "predicted", "message"),
    [
        (QUESTIONS, {"1": "red"}, "question 2 of GQA has no prediction; answer all that are scored"),
        (
            {"1": QUESTIONS["1"]},
            PREDICTED,
            "question 1 of GQA entails 2, which is not among the 1 questions; consistency needs the file of all "
            "questions, not only the balanced ones",
        ),
        (
            QUESTIONS,
            {number: answer for number, answer in PREDICTED.items() if number != "6"},
            "question 6 of GQA has no prediction; answer all that are scored",
        ),
        ({"6": QUESTIONS["6"]}, PREDICTED, "no question of GQA is balanced; scores are over the balanced ones"),
    ],
)
def test_what_is_missing_is_said(questions: dict[str, GQAQuestion], predicted: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as error:
        gqa_scores(questions, predicted, consistency=True)
    assert str(error.value) == message


def test_choices_of_another_split_are_refused() -> None:
    with pytest.raises(DataError, match="question 5 of GQA is not in the choices file"):
        gqa_scores(QUESTIONS, PREDICTED, {number: one for number, one in CHOICES.items() if number != "5"})


def test_consistency_needs_an_answer_that_is_right() -> None:
    assert consistencies(QUESTIONS, PREDICTED | {"1": "blue"}) == {"2": 0.0}

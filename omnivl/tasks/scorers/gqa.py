"""GQA: accuracy, consistency, validity, plausibility and distribution.

Source: Hudson and Manning, arXiv 1902.09506, section 4.4; eval.py of cs.stanford.edu/people/dorarad/gqa/evaluate.html.
Differs: shares lie in [0, 1], and a score of no question at all is left out where the official program prints 0. LAVIS
    and others normalise answers as VQA's evaluation does, which is not GQA's score. Grounding, of attention maps, is
    left out.

Every score is over the balanced questions, of which B is the number; a is the answer and p what was predicted.

- accuracy: mean of [p = a], exact texts; so by structural and semantic type, and for binary and open questions (open
  ones have the structural type ``query``).
- consistency: over the balanced questions that are answered right and entail others, the mean of the accuracy over the
  entailed ones. Those need not be balanced, so that all questions have to be answered; a question that is in the list
  of its own entailed ones does not count there.
- validity, plausibility: share of p among the answers that the choices file gives for the question. Questions whose
  detailed type has ``Common`` in it (what two things have in common) have the choices color, material and shape.
- distribution: chi-square of predicted against right answers within each **global** group g, weighted by size:
  ``sum_g n_g * sum_a (o_ga - e_ga)^2 / e_ga / sum_g n_g / 100``, where e_ga is how often a is the right answer in g,
  o_ga how often it is predicted, and n_g the number of questions. Answers that are right nowhere in g add nothing;
  questions without a global group are left out. Lower is better; it grows with the number of questions.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from omnivl.errors import DataError
from omnivl.tasks.scorers.groups import by_group

_COMMON = ("color", "material", "shape")


@dataclass(frozen=True)
class GQAQuestion:
    """What scores read of a question.

    Attributes:
        answer: The right answer.
        structural: Structural type: ``verify``, ``query``, ``choose``, ``logical`` or ``compare``.
        semantic: Semantic type: ``obj``, ``attr``, ``cat``, ``rel`` or ``global``.
        detailed: Detailed type.
        group: Its global group, ``groups.global`` of the file; None for none.
        entailed: Ids of the questions that its answer answers.
        balanced: Whether it belongs to the balanced ones.
    """

    answer: str
    structural: str
    semantic: str
    detailed: str = ""
    group: str | None = None
    entailed: tuple[str, ...] = ()
    balanced: bool = True


@dataclass(frozen=True)
class Choices:
    """The choices file's entry of a question.

    Attributes:
        valid: Answers of the right kind.
        plausible: Answers that occur for such an object.
    """

    valid: Collection[str]
    plausible: Collection[str]


Questions = Mapping[str, GQAQuestion]
"""Questions by their ids."""

Predicted = Mapping[str, str]
"""Predicted answers by the ids of questions."""


def is_right(questions: Questions, predicted: Predicted) -> dict[str, bool]:
    """Whether each balanced question is answered right, by id; accuracy is the mean.

    Raises:
        DataError: A balanced question has no prediction.
    """
    return {number: _prediction(predicted, number) == one.answer for number, one in questions.items() if one.balanced}


def accuracies(questions: Questions, predicted: Predicted) -> dict[str, float]:
    """``accuracy``, of ``binary`` and ``open`` questions, and by type: ``structural: query``, ``semantic: attr``.

    Raises:
        DataError: See ``is_right``; or no question is balanced.
    """
    right = is_right(questions, predicted)
    if not right:
        raise DataError("no question of GQA is balanced; scores are over the balanced ones")
    values = [float(one) for one in right.values()]
    groups = zip(*(groups_of(questions[number]) for number in right), strict=True)
    found = {"accuracy": sum(values) / len(values)}
    return found | {name: value for names in groups for name, value in by_group(names, values).items()}


def groups_of(question: GQAQuestion) -> tuple[str, str, str]:
    """The groups to which a question belongs: ``open`` or ``binary``, ``structural: query``, ``semantic: attr``."""
    form = "open" if question.structural == "query" else "binary"
    return form, f"structural: {question.structural}", f"semantic: {question.semantic}"


def consistencies(questions: Questions, predicted: Predicted) -> dict[str, float]:
    """Of each balanced question that is right and entails others, its accuracy over those; consistency is the mean.

    Raises:
        DataError: An entailed question is not among the questions, or has no prediction.
    """
    found = {}
    for number, right in is_right(questions, predicted).items():
        entailed = [other for other in questions[number].entailed if other != number]
        if not right or not entailed:
            continue
        if missing := [other for other in entailed if other not in questions]:
            raise DataError(
                f"question {number} of GQA entails {missing[0]}, which is not among the {len(questions)} questions; "
                "consistency needs the file of all questions, not only the balanced ones"
            )
        hits = [_prediction(predicted, other) == questions[other].answer for other in entailed]
        found[number] = sum(hits) / len(hits)
    return found


def valid_and_plausible(
    questions: Questions, predicted: Predicted, choices: Mapping[str, Choices]
) -> dict[str, tuple[bool, bool]]:
    """Whether the answer to each balanced question is valid, and whether it is plausible; the scores are the means.

    Raises:
        DataError: A balanced question has no choices, or no prediction.
    """
    found = {}
    for number, one in questions.items():
        if not one.balanced:
            continue
        if number not in choices:
            raise DataError(f"question {number} of GQA is not in the choices file; give that of the same split")
        answer, own = _prediction(predicted, number), choices[number]
        common = "Common" in one.detailed
        found[number] = (
            answer in (_COMMON if common else own.valid),
            answer in (_COMMON if common else own.plausible),
        )
    return found


def distribution(questions: Questions, predicted: Predicted) -> float | None:
    """The chi-square of the predicted answers, as at the top of this file; None if no question has a group.

    Raises:
        DataError: A balanced question has no prediction.
    """
    right: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for number, one in questions.items():
        if one.balanced and one.group is not None:
            right[one.group][one.answer] += 1
            given[one.group][_prediction(predicted, number)] += 1
    total = sum(answers.total() for answers in right.values())
    if not total:
        return None
    weighted = sum(
        answers.total() * sum((given[group][answer] - count) ** 2 / count for answer, count in answers.items())
        for group, answers in right.items()
    )
    return weighted / total / 100


def gqa_scores(
    questions: Questions, predicted: Predicted, choices: Mapping[str, Choices] | None = None, consistency: bool = False
) -> dict[str, float]:
    """All scores by name.

    Args:
        questions: Questions by id: all of them for consistency, else the balanced ones suffice.
        predicted: Predicted answers by id.
        choices: The choices file, for validity and plausibility.
        consistency: Whether to score consistency.

    Raises:
        DataError: Something is missing, see the functions above.
    """
    found = accuracies(questions, predicted)
    if consistency and (each := consistencies(questions, predicted)):
        found["consistency"] = sum(each.values()) / len(each)
    if choices is not None:
        pairs = list(valid_and_plausible(questions, predicted, choices).values())
        found["validity"] = sum(valid for valid, _ in pairs) / len(pairs)
        found["plausibility"] = sum(plausible for _, plausible in pairs) / len(pairs)
    if (chi_square := distribution(questions, predicted)) is not None:
        found["distribution"] = chi_square
    return found


def _prediction(predicted: Predicted, number: str) -> str:
    if number not in predicted:
        raise DataError(f"question {number} of GQA has no prediction; answer all that are scored")
    return predicted[number]

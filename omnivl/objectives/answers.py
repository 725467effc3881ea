"""Shared by objectives on answers: fields of samples, and scores of answers."""

from collections.abc import Iterator, Mapping
from typing import Literal

from omnivl.data.batch import Batch
from omnivl.data.fields import Field

ANSWERS, WEIGHTS = "answers", "weights"
MOST_ANSWERS = 10
"""Largest number of answers that a sample may list: those of ten people, as in VQA."""


SoftScores = Literal["metric", "official"]
_OFFICIAL = (0.0, 0.3, 0.6, 0.9)


def answer_fields(length: int = 0) -> Mapping[str, Field]:
    """Fields of a sample with its answers: each once with its weight, or as people gave them, without weights.

    Args:
        length: Token positions of an answer; 0 for none.
    """
    return {
        ANSWERS: Field("text", most=MOST_ANSWERS, length=length),
        WEIGHTS: Field("number", most=MOST_ANSWERS, required=False, as_many_as=ANSWERS),
    }


def answer_shares(batch: Batch) -> Iterator[dict[str, tuple[float, int]]]:
    """Yields for each sample its answers, each with the share of people who gave it and its first place in the list.

    A share is the answer's weight; without weights, its count in the list over the length of the list.
    """
    weights, present = batch.fields.get(WEIGHTS), batch.fields.get(f"{WEIGHTS}/present")
    for row, listed in enumerate(batch.fields[ANSWERS]):
        assert isinstance(listed, tuple), "answers are a field with more than one value"
        weighed = present is not None and bool(present[row][0])  # type: ignore[index]
        found: dict[str, tuple[float, int]] = {}
        for place, answer in enumerate(map(str, listed)):
            share = float(weights[row][place]) if weighed else 1.0 / len(listed)  # type: ignore[index]
            before, first = found.get(answer, (0.0, place))
            found[answer] = (before + share, first)
        yield found


def soft_score(share: float, kind: SoftScores) -> float:
    """Score, from 0 to 1, of an answer that a share of ten people gave.

    Args:
        share: From 0 to 1; n people of ten.
        kind: ``official`` is 0, 0.3, 0.6, 0.9 and 1 for n of 0, 1, 2, 3 and more: the mean of min(m / 3, 1), where m
            counts the people who gave it without one person, who is left out in turn. ``metric`` is min(n / 3, 1).
    """
    people = round(10 * share)
    if kind == "metric":
        return min(people / 3, 1.0)
    return _OFFICIAL[people] if people < len(_OFFICIAL) else 1.0

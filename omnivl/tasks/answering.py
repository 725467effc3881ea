"""Answers to a question about each sample: those of a stage's head, and people's."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from omnivl.data.sources.base import Sample
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import caption_search
from omnivl.inference.pictures import PictureSet
from omnivl.objectives.answer import Answer
from omnivl.objectives.answers import ANSWERS, MOST_ANSWERS, WEIGHTS
from omnivl.objectives.choose import Choose
from omnivl.objectives.vqa import VQA
from omnivl.tasks.spelling import comparable


def answers_of(
    key: str,
    pictures: PictureSet,
    questions: Sequence[str],
    encoder: Encoder,
    choices: Sequence[str] = (),
    *,
    candidates: int = 128,
    first_token_twice: bool = False,
) -> list[tuple[str, float | None]]:
    """The answer to each question, and how likely it is.

    Args:
        key: Of an objective of kind ``vqa``, which chooses from its own list, or ``answer``, which ranks ``choices`` if
            there are some, else writes.
        pictures: N samples.
        questions: Their questions.
        encoder: The trained stage.
        choices: Answers to rank.
        candidates: See ``Encoder.rank``.
        first_token_twice: See ``Encoder.rank``.

    Returns:
        N answers, a written one as the tokenizer decodes it, each with its probability: that of the head, of a ranked
        answer that of writing it; None of a written one, and where the first token counts twice.
    """
    objective = encoder.chain.objectives[key]
    if isinstance(objective, VQA):
        return likeliest(objective, encoder.predict(key, pictures, questions), objective.choices)
    assert isinstance(objective, Answer), "as needs says"
    if choices:
        ranked = encoder.rank(
            key,
            pictures,
            questions,
            choices,
            length=objective.length,
            candidates=candidates,
            first_token_twice=first_token_twice,
        )
        found = zip(*(one.tolist() for one in ranked.max(dim=1)), strict=True)
        return [(choices[place], None if first_token_twice else math.exp(value)) for value, place in found]
    search = caption_search(encoder.tokenizer.special, objective.length - 1)
    written = encoder.generate(key, pictures, search, questions)
    return [(encoder.tokenizer.decode(tokens), None) for tokens in written.tolist()]


def likeliest(objective: VQA | Choose, scores: Tensor, choices: Sequence[str]) -> list[tuple[str, float | None]]:
    """The answer with the highest of the scores ``[N, A]`` in each row, and its probability.

    Args:
        objective: Which says how likely answers are by their scores.
        scores: See above.
        choices: The A answers.
    """
    best = scores.argmax(dim=1)
    shares = objective.probabilities(scores)[torch.arange(len(best)), best].tolist()
    return [(choices[place], share) for place, share in zip(best.tolist(), shares, strict=True)]


def as_people_spell(answer: str, given: Sequence[str]) -> str:
    """People's own spelling of an answer, where they gave it: a tokenizer has lost its case and the spaces at marks."""
    return next((one for one in given if comparable(one) == comparable(answer)), answer)


def counted(given: Sequence[str]) -> str:
    """People's answers in words, the most frequent first: how many gave each."""
    return ", ".join(f"{answer} ({count})" for answer, count in Counter(given).most_common())


def people_of(sample: Sample) -> list[str]:
    """People's answers to the question of a sample: as listed, or each answer repeated by its weight.

    Raises:
        DataError: It has no answers.
    """
    listed, weights = sample.meta.get(ANSWERS), sample.meta.get(WEIGHTS)
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{sample.where} has no list {ANSWERS!r}, which this task needs; filter it out with `where`")
    if not isinstance(weights, list):
        return [str(answer) for answer in listed]
    people = [
        str(answer)
        for answer, weight in zip(listed, weights, strict=True)
        for _ in range(round(MOST_ANSWERS * float(weight)))
    ]
    return people or [str(answer) for answer in listed]

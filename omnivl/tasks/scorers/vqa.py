"""VQA's score of an answer, by the answers of ten people.

Source: Antol et al., VQA, arXiv 1505.00468, section 4, and the rules of the official evaluation of VQA v2
    (visualqa.org/evaluation; vqaEval.py of github.com/GT-Vision-Lab/VQA): spelling is normalised on both sides if
    people disagree, and each person is left out in turn.
Differs: the official program prints per cent, rounded to two places. Its older version, which ALBEF's and LAVIS's
    ``vqaTools`` carry, always normalises the prediction, and of people's answers only the punctuation: there "two"
    never matches the "two" of people, and answers that all people spell alike can be missed.
"""

import re
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official program passes a flag of that value as the number of replacements."""
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Contractions by their spellings without one of the apostrophes; and a slip of the official table."""


def normalised(answer: str) -> str:
    """An answer in normalised spelling.

    Punctuation and articles are removed. Numbers up to ten become digits, and contractions get their apostrophes.
    """
    words = (_NUMBERS.get(word, word) for word in without_punctuation(answer).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(answer: str) -> str:
    """An answer without punctuation marks (between letters they become spaces) and without periods outside of numbers.

    A mark next to a space, and a comma within a number, is removed without a space.
    """
    joins_all = _COMMA_IN_NUMBER.search(answer) is not None
    found = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        found = found.replace(mark, "" if beside_space or joins_all else " ")
    return _PERIOD.sub("", found, count=_MOST_PERIODS)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """The score of one answer, from 0 to 1.

    The mean over the people who answered, each left out in turn, of min(1, m / 3), where m of the others gave the
    answer. Spelling is normalised only if people's answers are not all the same text. The definition holds for any
    number of people, but assumes ten: if three people agree, two are left each time, hence 2 / 3; of a single person
    nobody is left, hence 0.

    Args:
        answer: The answer to score.
        given: People's answers, at least one.
    """
    answer, given = _on_one_line(answer), [_on_one_line(one) for one in given]
    if len(set(given)) > 1:
        answer, given = normalised(answer), [normalised(one) for one in given]
    people = sum(one == answer for one in given)
    scores = [min(1.0, (people - (one == answer)) / 3) for one in given]
    return sum(scores) / len(scores)


def best_constant(asked: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The constant answer to several questions with the best mean score, and that score.

    Args:
        asked: People's answers to each question.
    """
    totals: Counter[str] = Counter()
    for given in asked:
        for answer in dict.fromkeys(given):
            totals[answer] += vqa_accuracy(answer, given)  # type: ignore[assignment]  # a Counter adds up any numbers
    answer, total = totals.most_common(1)[0]
    return answer, total / len(asked)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()

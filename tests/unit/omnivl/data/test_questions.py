"""Generated questions: pure, balanced, and not to be answered without the drawing."""

import pickle
from collections import Counter
from pathlib import Path

import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources import open_source
from omnivl.data.sources.questions import QuestionSource, answer_list
from omnivl.errors import DataError
from omnivl.tasks.scorers.vqa import best_constant

WHERE = {"style": ("noto",), "group": ("food & drink",)}
DRAWN = 1500


def source(seed: int = 0, **where: tuple[str, ...]) -> QuestionSource:
    return QuestionSource(DataEntryConfig(source="questions", kind="image_text", where={**WHERE, **where}), seed=seed)


def people(sample) -> list[str]:
    pairs = zip(sample.meta["answers"], sample.meta["weights"], strict=True)
    return [answer for answer, weight in pairs for _ in range(round(10 * weight))]


def test_a_question_is_a_pure_function_of_seed_part_and_index() -> None:
    one, other = source(), pickle.loads(pickle.dumps(source()))
    first = [other.read(index) for index in (5, 3)]
    assert [one.read(index) for index in (3, 5)] == first[::-1]
    told = {
        key: [own.read(index).meta["question"] for index in range(40)]
        for key, own in {"seed": source(seed=1), "part": source(part=("val",)), "same": source()}.items()
    }
    assert told["seed"] != told["same"] != told["part"]
    assert one.read(3).captions == (one.read(3).meta["question"],)
    assert isinstance(open_source(DataEntryConfig(source="questions", kind="image_text"), seed=0), QuestionSource)


def test_all_types_are_asked_equally_often_and_every_answer_is_one_of_ten_peoples() -> None:
    own = source()
    samples = [own.read(index) for index in range(DRAWN)]
    counts = Counter(sample.meta["question_type"] for sample in samples)
    assert all(count == pytest.approx(DRAWN / 4, rel=0.15) for count in counts.values())
    assert all(len(people(sample)) == 10 for sample in samples)
    several = [sample for sample in samples if len(sample.meta["answers"]) > 1]
    assert several and {sample.meta["question_type"] for sample in several} == {"name"}
    assert all(sample.meta["answers"][0] == sample.meta["name"] for sample in several)
    assert sorted({min(sample.meta["weights"]) for sample in several}) == [0.2, 0.3, 0.4]


def test_names_and_checks_cannot_be_answered_from_the_question() -> None:
    for asked, most in {"name": 0.04, "check": 0.55}.items():
        own = source(question_type=(asked,))
        samples = [own.read(index) for index in range(DRAWN)]
        assert best_constant([people(sample) for sample in samples])[1] < most
    checks = [(sample.meta["question"].split(maxsplit=2)[-1], sample.meta["answers"]) for sample in samples]
    yes = Counter(name for name, answers in checks if answers == ["yes"])
    no = Counter(name for name, answers in checks if answers == ["no"])
    assert sum(yes.values()) == pytest.approx(DRAWN / 2, rel=0.1)
    # A name that is asked for more often in one of the two would be an answer in itself.
    assert max(yes.values()) < 25 and max(no.values()) < 25


def test_a_check_names_another_concept_where_the_answer_is_no() -> None:
    own = source(question_type=("check",))
    for index in range(300):
        sample = own.read(index)
        names_it = sample.meta["name"] in sample.meta["question"]
        assert sample.meta["answers"] in (["yes"] if names_it else ["no"], ["no"])
        assert sample.meta["answers"] == ["no"] or names_it


def test_the_list_of_answers_holds_every_answer() -> None:
    answers = answer_list({**WHERE, "question_type": ("name", "kind", "check")})
    own = source(question_type=("name", "kind", "check"))
    given = {answer for index in range(DRAWN) for answer in own.read(index).meta["answers"]}
    assert given <= set(answers)
    assert len(set(answers)) == len(answers)
    file = Path(__file__).parents[4] / "configs/plans/vqa_tiny_answers.txt"
    assert tuple(file.read_text(encoding="utf-8").splitlines()) == answers


@pytest.mark.parametrize(
    ("kind", "where", "message"),
    [
        ("image_label", {}, "data source 'questions': kind is 'image_label'; allowed: 'image_text'; change it"),
        (
            "image_text",
            {"part": ("dev",)},
            "data source 'questions': where.part is ['dev']; allowed: one of train, val, test; change it",
        ),
        (
            "image_text",
            {"question_type": ("why",)},
            "data source 'questions': where.question_type is ['why']; allowed: name, kind, category, check; change it",
        ),
        (
            "image_text",
            {"question_type": ()},
            "data source 'questions': where.question_type is []; allowed: name, kind, category, check; change it",
        ),
        (
            "image_text",
            {"part": ("train", "val")},
            "data source 'questions': where.part is ['train', 'val']; allowed: one of train, val, test; change it",
        ),
    ],
)
def test_what_it_cannot_ask_is_refused(kind, where, message: str) -> None:
    with pytest.raises(DataError) as caught:
        QuestionSource(DataEntryConfig(source="questions", kind=kind, where=where), seed=0)
    assert str(caught.value) == message


def test_one_drawing_alone_has_no_other_to_be_mistaken_for() -> None:
    own = source(question_type=("check",), hexcode=("1f347",))
    with pytest.raises(DataError, match="allow more than 1 drawings in where, or leave 'check' out"):
        [own.read(index) for index in range(20)]

"""Few-shot tasks: what stands before a query, what oracles and small models get, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FOOD, MODEL, encoder_of
from torch import Tensor

from omnivl.architectures import ViLT
from omnivl.data.config import DataEntryConfig
from omnivl.data.sources import open_source
from omnivl.data.sources.base import Sample, Source
from omnivl.data.sources.scenes.documents import NAMES
from omnivl.errors import DataError, UserError
from omnivl.inference import pictures as read
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import PatchAttention, patch_attention
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import VQA, Answer, Choose
from omnivl.tasks import ClassificationTask, FewShotTask, Lack, Provided, few_shot
from omnivl.tasks.results import Score, evenly, write_files
from omnivl.tasks.run import run_tasks
from omnivl.tasks.scorers.vqa import best_constant

LABELS = ("drink", "fruit")
KINDS = FewShotTask(
    objective="vqa",
    source="emoji",
    where={"label": LABELS, "style": ("noto",)},
    support={"label": LABELS, "style": ("fluent",)},
    shots=(0, 2, 4),
    answer="label",
    example="this is a {answer}.",
    query="what is this?",
    gallery=2,
)
HEAD = VQA(answers=LABELS, loss_kind="softmax")


def scores_of(task: FewShotTask, encoder: Any) -> dict[str, Score]:
    (result,) = run_tasks([task], encoder)
    return {score.metric: score for score in result.scores}


def labels_of_pictures(task: FewShotTask) -> dict[bytes, str]:
    sets = [PictureSet(task.source, "image", one, MODEL.inputs, 4096, "media") for one in (task.where, task.support)]
    return {sample.media: str(sample.label) for one in sets for sample in one.samples if sample.media is not None}


def test_examples_stand_before_the_query_with_their_pictures() -> None:
    known, seen = labels_of_pictures(KINDS), dict[str, list[tuple[bytes, ...]]]()

    def right(sample: Sample, text: str) -> Tensor:
        *examples, asked = text.split(". ")
        *shown, own = sample.members.values()
        assert asked == "what is this?" and list(sample.members) == [f"{n}.webp" for n in range(len(shown) + 1)]
        assert known[own] == sample.label
        assert len(shown) in (0, 2, 4) and len(examples) == (len(shown) or 2)
        if shown:
            assert [one.removeprefix("this is a ") for one in examples] == [known[one] for one in shown]
            assert len(set(shown)) == len(shown)
        seen.setdefault(sample.where, []).append((*shown,))
        return torch.eye(2)[LABELS.index(str(sample.label))]

    found = scores_of(KINDS, encoder_of(HEAD, says=right))
    assert {name: score.value for name, score in found.items()} == {f"accuracy, {n} shots": 1.0 for n in (0, 2, 4)}
    assert all(score.chance is not None and 0.5 < score.chance < 0.8 and score.interval for score in found.values())
    assert len(seen) == found["accuracy, 0 shots"].count
    for none, two, four in seen.values():
        assert (len(none), len(two), len(four)) == (0, 2, 4) and four[:2] == two, "more examples begin with the same"
    assert len({four for _, _, four in seen.values()}) > len(seen) / 2, "each query has its own"


def test_a_query_is_never_its_own_example() -> None:
    where = {"label": ("drink",), "style": ("noto",)}
    count = len(PictureSet("emoji", "image", where, MODEL.inputs, 4096, "media"))
    task = replace(KINDS, where=where, support=where, shots=(count - 1,))

    def says(sample: Sample, text: str) -> Tensor:
        assert len(set(sample.members.values())) == count, "all others, then the query"
        return torch.tensor([1.0, 0.0])

    encoder = encoder_of(HEAD, says=says, model=replace(MODEL, text_length=8 * count))
    assert scores_of(task, encoder)[f"accuracy, {count - 1} shots"].value == 1.0
    with pytest.raises(DataError, match=rf"{count - 1} samples of support can stand before .*; allowed: {count} or"):
        scores_of(replace(task, shots=(count,)), encoder)


def test_what_the_examples_say_counts() -> None:
    """A model that repeats the class of the last example is right as often as classes meet by chance."""

    def repeats(sample: Sample, text: str) -> Tensor:
        return torch.eye(2)[LABELS.index(text.split(". ")[-2].removeprefix("this is a "))]

    task = replace(KINDS, shots=(1, 3), predictions=True)
    (result,) = run_tasks([task], encoder_of(HEAD, says=repeats))
    assert all(0.3 < score.value < 0.8 for score in result.scores)


def test_predictions_are_kept_by_the_number_of_examples(tmp_path: Path) -> None:
    def says(sample: Sample, text: str) -> Tensor:
        return torch.eye(2)[int(len(sample.members) > 3)]

    (result,) = run_tasks([replace(KINDS, predictions=True)], encoder_of(HEAD, says=says))
    (path,) = write_files([result], tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert line["answers"] == {"0": "drink", "2": "drink", "4": "fruit"} and line["text"] == "what is this?"
        assert line["probabilities"] == {n: pytest.approx(np.e / (np.e + 1)) for n in ("0", "2", "4")}
        assert line["scores"] == {n: float(own == line["truth"][0]) for n, own in line["answers"].items()}
        assert line["right"] == (line["truth"] == ["fruit"]) and "read" not in line, "bytes of pictures are not kept"
    by_shots = {score.metric: score.value for score in result.scores}
    assert by_shots["accuracy, 2 shots"] == pytest.approx(1 - by_shots["accuracy, 4 shots"])
    (gallery,) = result.galleries
    # A head with scores 1 and 0 has a probability of e / (e + 1).
    assert {one.measure for one in gallery.examples} == {
        "with 4 examples, probability 73%, 'drink' with 0, 'drink' with 2"
    }
    assert [(one.given, one.asked, one.right) for one in gallery.examples] == [
        ("fruit", "what is this?", one.wanted == "fruit") for one in gallery.examples
    ]
    assert len(gallery.examples) == 2 and f"Right means: {KINDS.right_means}." in gallery.notes[0]


def test_the_attention_is_that_to_the_whole_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts and pictures that the answers with the most examples were given about."""
    heard: list[tuple[PictureSet, list[str]]] = []

    def hears(encoder: Encoder, objective: str, pictures: PictureSet, texts: list[str]) -> PatchAttention | None:
        heard.append((pictures, texts))
        return patch_attention(encoder, objective, pictures, texts)

    asked: dict[str, dict[int, tuple[list[bytes], str]]] = {}

    def says(sample: Sample, text: str) -> Tensor:
        members = [*sample.members.values()]
        asked.setdefault(sample.where, {})[len(members)] = members, text
        return torch.tensor([0.0, float(text.endswith("fruit"))])

    opened: list[str] = []

    def opens(entry: DataEntryConfig, **options: Any) -> Source:
        opened.append(entry.where["style"][0])
        return open_source(entry, **options)

    monkeypatch.setattr(few_shot, "patch_attention", hears)
    monkeypatch.setattr(read, "open_source", opens)
    (result,) = run_tasks([replace(KINDS, max_samples=9)], encoder_of(HEAD, says=says))
    assert opened == ["noto", "fluent"], "queries and support, each once"
    ((documents, texts),) = heard
    shown = [([*one.members.values()], text) for one, text in zip(documents.samples, texts, strict=True)]
    assert shown == [asked[one.where][5] for one in documents.samples]
    assert [one.where for one in documents.samples] == [[*asked][place] for place in evenly(9, 2)]
    for one in result.galleries[0].examples:
        assert one.attention is not None and "of 5" in one.attention.text
    chosen = replace(KINDS, objective="choose", answers=LABELS, max_samples=2)
    run_tasks([chosen], encoder_of(Choose(), says=lambda sample, text: float("fruit" in text[-6:])))
    assert all(text.endswith("what is this? fruit") for text in heard[1][1]) and len(heard[1][1]) == 2


def test_queries_need_not_say_what_is_right() -> None:
    """As samples of a test set, which are predicted and not judged; the examples say it."""
    encoder = encoder_of(HEAD, says=lambda sample, text: torch.eye(2)[int(len(sample.members) > 3)])
    pictures = KINDS.unjudged(encoder)
    pictures.samples = [replace(sample, label=None) for sample in pictures.samples[:5]]
    lines = KINDS.lines(pictures, encoder)
    assert [line["answers"] for line in lines] == [{"0": "drink", "2": "drink", "4": "fruit"}] * 5
    assert all(set(line) == {"where", "text", "answers", "probabilities"} for line in lines)


def test_it_runs_on_trained_heads_of_every_kind() -> None:
    """Generated pictures of questions, ranked, chosen and written by a chain of new weights."""
    task = FewShotTask(
        source="scenes",
        where={**FOOD, "question_type": ("exist", "ground")},
        support={**FOOD, "question_type": ("exist", "ground"), "part": ("train",)},
        max_samples=6,
        most_support=20,
        shots=(0, 1, 2),
    )
    model = replace(MODEL, text_length=96)
    for objective, options in (
        (Answer(), {"answers": ("yes", "no")}),
        (Answer(), {}),
        (Choose(), {"answers": ("yes", "no")}),
        (VQA(answers=("yes", "no")), {}),
    ):
        own = replace(task, objective=objective.key, **options)
        assert own.lacks(Provided(model, (objective,))) == []
        found = scores_of(own, encoder_of(objective, model=model))
        assert list(found) == [f"accuracy, {shots} shots" for shots in (0, 1, 2)]
        assert all(0 <= score.value <= 1 and score.count == 6 for score in found.values())


def test_several_peoples_answers_give_vqa_accuracy() -> None:
    task = FewShotTask(
        objective="vqa",
        source="questions",
        where={"style": ("twemoji",), "group": ("food & drink",), "question_type": ("kind", "check")},
        support={"style": ("noto",), "group": ("food & drink",)},
        answer="answers",
        example="{question} {answer}.",
        query="{question}",
        shots=(1,),
        max_samples=10,
    )
    ten: list[list[str]] = []

    def says(sample: Sample, text: str) -> Tensor:
        assert text.endswith(str(sample.meta["question"]))
        return torch.tensor([1.0, 0.0])

    read = FewShotTask.picture_set

    def asked(self: FewShotTask, encoder: Any) -> PictureSet:
        pictures = read(self, encoder)
        for place, sample in enumerate(pictures.samples):
            given = ["yes"] * (place % 4) + ["no"] * (10 - place % 4)
            ten.append(given)
            pictures.samples[place] = replace(sample, meta={**sample.meta, "answers": given, "weights": None})
        return pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FewShotTask, "picture_set", asked)
        (result,) = run_tasks([task], encoder_of(VQA(answers=("yes", "no")), says=says))
    (score,), (gallery,) = result.scores, result.galleries
    # n of ten who said yes: 0, 0.3, 0.6, 0.9 by the mean over the people, each left out in turn.
    assert score.value == pytest.approx(np.mean([0.3 * (place % 4) for place in range(10)]))
    assert score.chance == pytest.approx(best_constant(ten)[1])
    # Each answer of kind `binary` is judged separately: 1 / (1 + 1 / e).
    assert [(one.measure, one.wanted) for one in gallery.examples[:4]] == [
        ("with 1 example, probability 73%, VQA accuracy 0.00", "no (10)"),
        ("with 1 example, probability 73%, VQA accuracy 0.30", "no (9), yes (1)"),
        ("with 1 example, probability 73%, VQA accuracy 0.60", "no (8), yes (2)"),
        ("with 1 example, probability 73%, VQA accuracy 0.90", "no (7), yes (3)"),
    ]


def test_documents_of_scenes_are_answered_among_their_own_names() -> None:
    """The choice is restricted to the names that a document binds, of which a random one is right by chance."""
    names = NAMES[:12]
    task = ClassificationTask(
        where={**FOOD, "task": ("documents",), "shots": ("2",)},
        pictures=("1.png", "2.png", "query.png"),
        options="options",
        by="shots",
        max_samples=100,
    )

    def says(sample: Sample, text: str) -> Tensor:
        options = sample.meta["options"]
        assert isinstance(options, list) and all(f"this is a {name}." in text for name in options)
        best = [float(name not in options) + 0.1 * (name == sample.meta["answer"]) for name in names]
        return torch.tensor(best)

    head = VQA(answers=NAMES, loss_kind="softmax")
    encoder = encoder_of(head, says=lambda sample, text: torch.cat([says(sample, text), torch.full((4,), -1.0)]))
    (result,) = run_tasks([task], encoder)
    some = [score for score in result.scores if score.metric == "accuracy"]
    assert [score.chance for score in result.scores] == [0.5, 0.5]
    pictures = task.picture_set(encoder)
    for sample, line in zip(pictures.samples, task.predict(pictures, encoder), strict=True):
        own = [0.1 * (one == sample.meta["answer"]) if one in names else -1.0 for one in sample.meta["options"]]
        assert line["probability"] == pytest.approx(np.exp(max(own)) / np.exp(own).sum()), "among the two names"
    unrestricted = run_tasks([replace(task, options=None)], encoder)[0].scores[0].value
    assert some[0].value > 0.5 and unrestricted == 0.0
    with pytest.raises(DataError, match=r"none of its 'options' \('\w+', '\w+'\) is in the list of 'vqa'; allowed: at"):
        run_tasks([task], encoder_of(VQA(answers=("a", "b"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (4, 0)}, "shots is [4, 0]; allowed: numbers from 0 on, each once, in rising order; change it"),
        ({"shots": ()}, "shots is []; allowed: numbers from 0 on"),
        ({"shots": (-1, 2)}, "shots is [-1, 2]; allowed: numbers from 0 on"),
        ({"media": "video"}, "media is 'video'; allowed: 'image'; change it"),
        ({"pictures": ("a.png",)}, "pictures is ['a.png']; allowed: none: samples have one picture each; remove it"),
        ({"example": "{text}"}, "example is '{text}'; allowed: a text with {answer}; add it"),
        ({"query": "it is {answer}"}, "query is 'it is {answer}'; allowed: a text without {answer}; take it out"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(KINDS, **options)
    assert str(caught.value).startswith(f"task few_shot: {message}")


def test_what_a_stage_or_a_sample_lacks_is_said() -> None:
    fused = ViLT()
    assert KINDS.lacks(Provided(fused, (HEAD,))) == [
        Lack("has architecture 'vilt', which takes no sets of pictures", "change model.kind")
    ]
    wrong = Lack("trains 'choose', which is of another kind", "name an objective of kind 'vqa' or 'answer'")
    assert replace(KINDS, objective="choose").lacks(Provided(MODEL, (Choose(),))) == [wrong]
    encoder = encoder_of(HEAD)
    with pytest.raises(DataError, match=r"'\{hue\}\?' asks for \{hue\}; allowed: .*name, .*; name another field"):
        run_tasks([replace(KINDS, query="{hue}?")], encoder)
    with pytest.raises(
        DataError, match=r"with 4 examples has \d+ tokens; allowed: 24, model\.text_length; lower shots"
    ):
        run_tasks([KINDS], encoder_of(HEAD, model=replace(MODEL, text_length=24)))
    with pytest.raises(DataError, match="'hue' is nothing; allowed: a text"):
        run_tasks([replace(KINDS, answer="hue")], encoder)


def test_examples_may_come_from_another_source() -> None:
    own, other = replace(KINDS, support_source="emoji_hands").samples, KINDS.samples
    assert [(one.path, one.source) for one in (*own, *other)] == [
        (("source",), "emoji"),
        (("support_source",), "emoji_hands"),
        (("source",), "emoji"),
        (("support",), "emoji"),
    ]

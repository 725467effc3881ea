"""Tasks of trained heads on generated scenes: what oracles and constants get, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FOOD, MODEL, TOKENIZER, encoder_of
from torch import Tensor

from omnivl.chain.objective import Objective
from omnivl.data.placement import crop_placement
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import TextReader
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.inference.predict import predict
from omnivl.objectives import VQA, Choose, Locate, Recognize, Region, Regress, Segment
from omnivl.tasks import (
    ClassificationTask,
    GroundingTask,
    Lack,
    NeighborsTask,
    OptionsTask,
    PhrasesTask,
    PredictingTask,
    Provided,
    SegmentationTask,
    SentimentTask,
    Task,
)
from omnivl.tasks.pairs import predict_pairs
from omnivl.tasks.results import write_files
from omnivl.tasks.run import run_tasks
from omnivl.tasks.scorers.boxes import iou, merged


def scores_of(task: Task, encoder: Encoder) -> dict[str, float]:
    (result,) = run_tasks([task], encoder)
    assert all(
        score.interval is None or score.interval[0] <= score.value <= score.interval[1] for score in result.scores
    )
    return {score.metric: score.value for score in result.scores}


def chances_of(task: Task, encoder: Encoder) -> dict[str, float | None]:
    (result,) = run_tasks([task], encoder)
    return {score.metric: score.chance for score in result.scores}


ANSWERS = ("contradiction", "neutral", "entailment")
ENTAILMENT = ClassificationTask(where={**FOOD, "task": ("entailment",)}, max_samples=60, gallery=3)


def test_classification() -> None:
    def right(sample: Sample, text: str) -> Tensor:
        assert text == sample.captions[0]
        return torch.eye(3)[ANSWERS.index(str(sample.meta["answer"]))]

    heads = VQA(answers=ANSWERS, loss_kind="softmax")
    assert scores_of(ENTAILMENT, encoder_of(heads, says=right)) == {"accuracy": 1.0}
    always = encoder_of(heads, says=lambda sample, text: torch.eye(3)[2])
    assert scores_of(ENTAILMENT, always)["accuracy"] < 0.6
    chance = chances_of(ENTAILMENT, always)["accuracy"]
    assert chance is not None and 1 / 3 < chance < 0.5
    (result,) = run_tasks([ENTAILMENT], always)
    assert {one.given for one in result.galleries[0].examples} == {"entailment"}
    unknown = encoder_of(VQA(answers=("a", "b")), says=lambda sample, text: torch.tensor([1.0, 0.0]))
    assert scores_of(ENTAILMENT, unknown)["accuracy"] == 0.0, "an answer that the list lacks is wrong"


def test_classification_by_a_field_and_of_sets() -> None:
    """Pairs of pictures go through the chain; consistency needs identifiers."""
    task = ClassificationTask(
        where={**FOOD, "task": ("pairs",)}, pictures=("left.png", "right.png"), max_samples=10, by="answer", gallery=2
    )
    scores = scores_of(task, encoder_of(VQA(answers=("false", "true"), loss_kind="softmax")))
    assert set(scores) == {"accuracy", "accuracy, false", "accuracy, true"}
    with pytest.raises(DataError, match="'identifier' is nothing; allowed: a text"):
        run_tasks([replace(task, identifier="identifier")], encoder_of(VQA(answers=("false", "true"))))
    lacking = replace(task, pictures=("left.png", "middle.png"))
    with pytest.raises(DataError, match=r"it has no file 'middle\.png'"):
        run_tasks([lacking], encoder_of(VQA(answers=("false", "true"))))


def test_recognition_of_labels() -> None:
    task = ClassificationTask(
        objective="recognize", source="emoji", where={"label": ("fruit", "drink"), "style": ("noto",)}, answer="label"
    )
    head = Recognize(classes=("drink", "fruit"))

    def right(sample: Sample, text: str) -> Tensor:
        assert text == ""
        return torch.eye(2)[("drink", "fruit").index(str(sample.label))]

    assert scores_of(task, encoder_of(head, says=right)) == {"accuracy": 1.0}


OPTIONS = OptionsTask(where={**FOOD, "task": ("reasons",)}, max_samples=40, reasons="why", gallery=2)
HEADS = (Choose(), Choose(name="why", field="rationales", index="rationale"))


def test_options_and_reasons() -> None:
    """An oracle that knows answers but not reasons."""

    def says(sample: Sample, text: str) -> float:
        return float(text.endswith(f" {sample.meta['answer']}")) if "because" not in text else 0.0

    scores = scores_of(OPTIONS, encoder_of(*HEADS, says=says))
    assert scores["accuracy"] == scores["mean reciprocal rank"] == scores["mean rank"] == 1.0
    assert scores["reason given the right answer"] == 0.0 == scores["both"], "ties count against the model"
    chances = chances_of(OPTIONS, encoder_of(*HEADS, says=says))
    assert chances["accuracy"] == 0.25 and chances["mean rank"] == 2.5

    def knows(sample: Sample, text: str) -> float:
        reasons = sample.meta["rationales"]
        assert isinstance(reasons, list)
        return float(text.endswith((f" {sample.meta['answer']}", reasons[int(str(sample.meta["rationale"]))])))

    scores = scores_of(OPTIONS, encoder_of(*HEADS, says=knows))
    assert scores["both"] == 1.0


def test_dialogues_have_ndcg() -> None:
    task = OptionsTask(where={**FOOD, "task": ("dialogue",)}, max_samples=30)
    head = Choose(options=3, most_options=10, context=("image_caption", "history"))

    def says(sample: Sample, text: str) -> float:
        assert text.startswith(str(sample.meta["image_caption"]))
        return -float(text.endswith(f"{sample.meta['question']} {sample.meta['answer']}"))

    scores = scores_of(task, encoder_of(head, says=says))
    assert scores["accuracy"] == 0.0 and scores["mean rank"] == 10.0 and scores["NDCG"] == 0.0
    assert scores["mean reciprocal rank"] == pytest.approx(0.1) and scores["R@5"] == 0.0


def test_ndcg_is_of_the_rounds_that_have_dense_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in VisDial, where one round of each dialogue has them; the first sample need not be one."""
    task = OptionsTask(where={**FOOD, "task": ("dialogue",)}, max_samples=8)
    read = OptionsTask.picture_set

    def sparse(self: OptionsTask, encoder: Encoder) -> PictureSet:
        pictures = read(self, encoder)
        for place in (0, 2, 3):
            one = pictures.samples[place]
            meta = {name: value for name, value in one.meta.items() if name != "relevance"}
            pictures.samples[place] = replace(one, meta=meta)
        return pictures

    monkeypatch.setattr(OptionsTask, "picture_set", sparse)
    knows = encoder_of(Choose(most_options=10), says=lambda one, text: float(text.endswith(f" {one.meta['answer']}")))
    (result,) = run_tasks([task], knows)
    (found,) = [score for score in result.scores if score.metric == "NDCG"]
    assert (found.value, found.count) == (1.0, 5)


def test_options_are_read_whole_behind_a_long_history() -> None:
    """A model that reads no more than the tokens of its texts still tells options apart by their last word."""
    task = OptionsTask(where={**FOOD, "task": ("dialogue",)}, max_samples=20)
    short = replace(MODEL, text_length=20)
    reader, uncut = TextReader(TOKENIZER, 20), set()

    def reads(sample: Sample, text: str) -> float:
        uncut.add(all(str(turn) in text for turn in sample.meta["history"]))  # type: ignore[attr-defined]
        answer = reader.words(f"? {sample.meta['answer']}")
        seen = reader.encode([text])[0].tolist()
        return float(seen[: seen.index(TOKENIZER.special.sep, 1)][-len(answer) :] == answer)

    knows = encoder_of(Choose(most_options=10, context=("history",)), says=reads, model=short)
    assert scores_of(task, knows)["accuracy"] == 1.0
    assert uncut == {True, False}, "some histories are too long"


GROUNDING = GroundingTask(where={**FOOD, "task": ("expressions",)}, max_samples=40, by="expression_type", gallery=2)


def test_grounding() -> None:
    right = encoder_of(Locate(), says=lambda sample, text: torch.tensor(sample.meta["box"]))
    scores = scores_of(GROUNDING, right)
    assert scores["accuracy at IoU 0.5"] == 1.0 and scores["mean IoU"] == pytest.approx(1.0, abs=1e-5)
    assert {"accuracy at IoU 0.5, name", "accuracy at IoU 0.5, size"} <= set(scores)
    chance = chances_of(GROUNDING, right)["accuracy at IoU 0.5"]
    assert chance is not None and 0.1 < chance < 0.5, "one of two to six candidates"
    whole = encoder_of(Locate(), says=lambda sample, text: torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert scores_of(GROUNDING, whole)["accuracy at IoU 0.5"] == 0.0


def test_grounding_by_regions() -> None:
    """Patches that are the box's own score highest."""

    def says(sample: Sample, text: str) -> Tensor:
        left, top, right, bottom = np.array(sample.meta["box"]) * 16
        scores = torch.zeros(16, 16)
        scores[round(top) : round(bottom), round(left) : round(right)] = 1.0
        return scores.flatten()

    task = replace(GROUNDING, objective="region")
    assert scores_of(task, encoder_of(Region(), says=says))["accuracy at IoU 0.5"] > 0.9
    without = replace(task, candidates="regions")
    with pytest.raises(DataError, match="has no list 'regions' of boxes to choose from"):
        run_tasks([without], encoder_of(Region(), says=says))


@dataclass(frozen=True)
class OfSeveral(Task):
    """Samples with two further texts, of which the second one is told apart."""

    def picture_set(self, encoder: Encoder) -> PictureSet:
        found = PictureSet(self.source, "image", self.where, encoder.model.inputs, self.max_samples, "media")
        found.samples = [
            replace(one, captions=(*one.captions, "that one", f"{one.captions[0]} again"), identity=f"picture {i // 2}")
            for i, one in enumerate(found.samples)
        ]
        return found


@dataclass(frozen=True)
class Boxes(GroundingTask, OfSeveral):
    """Boxes of samples of three texts."""


@dataclass(frozen=True)
class Masks(SegmentationTask, OfSeveral):
    """Masks of samples of three texts."""


def test_every_expression_of_a_sample_is_asked_and_counts(tmp_path: Path) -> None:
    given = {"where": {**FOOD, "task": ("expressions",)}, "max_samples": 10}

    def says(sample: Sample, text: str) -> Tensor:
        assert sample.captions == (text,), "each stands alone"
        return torch.zeros(4) if text == "that one" else torch.tensor(sample.meta["box"])

    (result,) = run_tasks([Boxes(**given, predictions=True, gallery=6)], encoder_of(Locate(), says=says))
    scores = {score.metric: score for score in result.scores}
    assert scores["accuracy at IoU 0.5"].value == pytest.approx(2 / 3) and scores["accuracy at IoU 0.5"].count == 30
    (file,) = write_files([result], tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["right"] for line in lines] == [True, False, True] * 10
    assert len({line["where"] for line in lines}) == 10 and lines[2]["text"] == f"{lines[0]['text']} again"
    assert [one.asked for one in result.galleries[0].examples] == [lines[5 * place]["text"] for place in range(6)]
    # Each of the five pictures has as many right as wrong ones, so that drawing pictures changes nothing.
    assert scores["accuracy at IoU 0.5"].interval == pytest.approx((2 / 3, 2 / 3))

    nothing = encoder_of(Segment(), says=lambda sample, text: -torch.ones(32, 32))
    (masks,) = run_tasks([Masks(**given)], nothing)
    assert {score.count for score in masks.scores} == {30}


def test_every_expression_is_predicted_where_nothing_is_known_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample("a", "s.tar:a", frames=np.zeros((1, 32, 32, 3), dtype=np.uint8), captions=("one", "two"))
    pictures = PictureSet.of([sample], "image", MODEL.inputs)
    monkeypatch.setattr(PredictingTask, "unjudged", lambda task, encoder: pictures)
    encoder = encoder_of(Locate(), says=lambda sample, text: torch.full((4,), float(text == "two")))
    task = GroundingTask()
    lines = task.lines(task.unjudged(encoder), encoder)
    assert [(line["where"], line["text"], line["box"].tolist()) for line in lines] == [
        ("s.tar:a", "one", [0.0] * 4),
        ("s.tar:a", "two", [1.0] * 4),
    ]


def test_samples_without_a_text_are_named_where_each_text_is_asked() -> None:
    sample = Sample("a", "s.tar:a", frames=np.zeros((1, 32, 32, 3), dtype=np.uint8), meta={"box": [0, 0, 1, 1]})
    pictures = PictureSet.of([sample, replace(sample, captions=("one", "two"))], "image", MODEL.inputs).by_caption()
    assert [one.captions for one in pictures.samples] == [(), ("one",), ("two",)]
    with pytest.raises(DataError, match=r"s\.tar:a has no caption"):
        _ = pictures.captions


def test_a_box_in_the_middle_of_a_wide_picture() -> None:
    """The model sees the middle square: its box is mapped back to the whole picture."""
    view = crop_placement(50, 0, 100, 100, (200, 100))
    whole, kept = view.inverse().boxes(np.array([[0.0, 0.1, 0.5, 1.0]]))
    np.testing.assert_allclose(whole, [[0.25, 0.1, 0.5, 1.0]])
    assert kept.all()
    back, _ = view.boxes(whole)
    np.testing.assert_allclose(back, [[0.0, 0.1, 0.5, 1.0]], atol=1e-12)


PHRASES = PhrasesTask(where={**FOOD, "task": ("phrases",)}, max_samples=30, gallery=4)


def _boxes_of(sample: Sample, text: str) -> np.ndarray:
    return np.array(sample.meta["phrase_boxes"][sample.meta["phrases"].index(text)])


def test_phrases() -> None:
    """Of phrases with several boxes, their first box hits by one protocol, the box around them by the other."""
    first = encoder_of(Locate(), says=lambda sample, text: torch.tensor(_boxes_of(sample, text)[0]))
    samples = PHRASES.picture_set(first).samples
    boxes = [own for sample in samples for own in sample.meta["phrase_boxes"]]  # type: ignore[attr-defined]
    alone = [len(own) == 1 for own in boxes]
    assert 0 < sum(alone) < len(alone)
    around = [merged(own) for own in boxes]
    close = [iou(np.array(own[:1]), box)[0] >= 0.5 for own, box in zip(boxes, around, strict=True)]
    assert scores_of(PHRASES, first) == {"any-box R@1": 1.0, "merged-box R@1": pytest.approx(np.mean(close))}
    whole = encoder_of(Locate(), says=lambda sample, text: torch.tensor(merged(_boxes_of(sample, text))[0]))
    scores = scores_of(PHRASES, whole)
    assert scores["merged-box R@1"] == 1.0
    assert np.mean(alone) <= scores["any-box R@1"] < 1.0
    (result,) = run_tasks([PHRASES], whole)
    assert {score.count for score in result.scores} == {len(boxes)}
    (gallery,) = result.galleries
    assert gallery.examples[0].asked == samples[0].meta["phrases"][0]  # type: ignore[index]
    assert gallery.marks == "boxes" and len(gallery.examples) == 4


def test_phrases_by_a_head_are_texts_of_their_own() -> None:
    encoder = encoder_of(Locate())
    few = replace(PHRASES, max_samples=3, gallery=0)
    pictures = few.picture_set(encoder)
    phrases = [(place, text) for place, one in enumerate(pictures.samples) for text in one.meta["phrases"]]  # type: ignore[attr-defined]
    texts = [text for _, text in phrases]
    shown = torch.tensor([place for place, _ in phrases])
    packed = predict_pairs(encoder, "locate", pictures, texts, shown, torch.arange(len(texts)))
    one_by_one = encoder.predict("locate", pictures.chosen(shown.tolist()), texts)
    torch.testing.assert_close(packed, one_by_one)
    assert scores_of(few, encoder).keys() == {"any-box R@1", "merged-box R@1"}


def test_many_texts_of_one_picture_pass_the_model_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model finds the same few pictures for every text: 703 texts for each took 4 GB at once."""
    encoder, passed = encoder_of(Locate()), list[int]()
    pictures = replace(PHRASES, max_samples=3).picture_set(encoder)
    texts = [f"the {number} th cat" for number in range(5 * encoder.most_texts // 2)]
    shown = torch.ones(len(texts), dtype=torch.int64)

    def noted(*given: Any) -> Tensor:
        passed.append(len(given[3]))
        return predict(*given)

    monkeypatch.setattr("omnivl.inference.encoder.predict", noted)
    packed = predict_pairs(encoder, "locate", pictures, texts, shown, torch.arange(len(texts)))
    assert sum(passed) >= len(texts) and max(passed) == encoder.most_texts
    passed.clear()
    one_by_one = encoder.predict("locate", pictures.chosen(shown.tolist()), texts)
    assert max(passed) < encoder.most_texts
    torch.testing.assert_close(packed, one_by_one)


def test_phrases_without_boxes_are_not_scored_and_bad_ones_refused() -> None:
    @dataclass(frozen=True)
    class Given(PhrasesTask):
        fields: tuple[dict[str, object], ...] = ()

        def picture_set(self, encoder: Encoder) -> PictureSet:
            found = super().picture_set(encoder)
            found.samples = [replace(one, meta=own) for one, own in zip(found.samples, self.fields, strict=True)]
            return found

    box = [0.0, 0.0, 0.5, 0.5]
    encoder = encoder_of(Locate(), says=lambda sample, text: torch.tensor(box))
    given = Given(
        where=PHRASES.where,
        max_samples=2,
        fields=(
            {"phrases": ["a", "it"], "phrase_boxes": [[box], []]},
            {"phrases": [], "phrase_boxes": []},
        ),
    )
    (result,) = run_tasks([given], encoder)
    assert [(score.value, score.count) for score in result.scores] == [(1.0, 1), (1.0, 1)]
    bad: list[tuple[dict[str, object], str]] = [
        ({}, "'phrases' is nothing; allowed: a list of texts"),
        ({"phrases": ["a"], "phrase_boxes": [[box], []]}, "allowed: a list of boxes for each of 1 phrases"),
        ({"phrases": ["a"], "phrase_boxes": [box]}, "allowed: a list of boxes for each of 1 phrases"),
        ({"phrases": ["a"], "phrase_boxes": [[]]}, "no phrase of 1 samples has a box"),
    ]
    for fields, message in bad:
        with pytest.raises(DataError, match=message):
            run_tasks([replace(given, max_samples=1, fields=(fields,))], encoder)


def test_segmentation() -> None:
    task = SegmentationTask(where={**FOOD, "task": ("expressions",)}, max_samples=20)
    sets = PictureSet("scenes", "image", task.where, MODEL.inputs, 20, "media")

    def says(sample: Sample, text: str) -> Tensor:
        place = next(i for i, one in enumerate(sets.samples) if one.where == sample.where)
        return torch.from_numpy(task._mask(sets, place)).float() - 0.5

    scores = scores_of(task, encoder_of(Segment(), says=says))
    assert scores["mIoU"] == scores["oIoU"] == scores["P@0.9"] == 1.0
    nothing = encoder_of(Segment(), says=lambda sample, text: -torch.ones(32, 32))
    assert scores_of(task, nothing)["mIoU"] == 0.0
    with pytest.raises(DataError, match=r"has no file 'other\.png'"):
        run_tasks([replace(task, mask="other.png")], nothing)


def test_sentiment() -> None:
    task = SentimentTask(where={"task": ("sentiment",)}, max_samples=60)
    right = encoder_of(Regress(), says=lambda sample, text: float(str(sample.meta["sentiment"])))
    scores = scores_of(task, right)
    assert scores["MAE"] == 0.0 and scores["Acc-7"] == scores["Acc-2 non0"] == scores["F1 has0"] == 1.0
    assert scores["correlation"] == pytest.approx(1.0)
    zero = encoder_of(Regress(), says=lambda sample, text: 0.0)
    found = scores_of(task, zero)
    assert "correlation" not in found, "of a constant there is none"
    chance = chances_of(task, zero)["MAE"]
    assert chance is not None and found["MAE"] >= chance > 1.0, "the median is the best constant"


def test_neighbors() -> None:
    """Embeddings that are the class find it; queries must not be among the labelled samples."""

    class Knowing(Encoder):
        def pictures(self, pictures: PictureSet) -> Tensor:
            return torch.stack([torch.eye(2)[int(sample.label == "fruit")] for sample in pictures.samples])

    labels = {"label": ("fruit", "drink")}
    task = NeighborsTask(where={**labels, "style": ("twemoji",)}, known={**labels, "style": ("noto",)}, k=5)
    made = encoder_of(VQA(answers=("a", "b")))
    encoder = Knowing(made.chain, made.model, made.tokenizer, made.gather, made.device)
    assert scores_of(task, encoder) == {"accuracy": 1.0}
    assert [samples.where for samples in task.samples] == [task.where, task.known]
    with pytest.raises(DataError, match="are among the labelled ones too"):
        run_tasks([replace(task, known=labels)], encoder)


@pytest.mark.parametrize(
    ("task", "objective", "wanted"),
    [
        (ClassificationTask(objective="locate"), Locate(), "'vqa' or 'recognize'"),
        (OptionsTask(objective="vqa"), VQA(answers=("a",)), "'choose'"),
        (GroundingTask(objective="vqa"), VQA(answers=("a",)), "'locate' or 'region'"),
        (SegmentationTask(objective="vqa"), VQA(answers=("a",)), "'segment'"),
        (SentimentTask(objective="vqa"), VQA(answers=("a",)), "'regress'"),
    ],
)
def test_an_objective_of_another_kind_is_named(task: Task, objective: Objective, wanted: str) -> None:
    (lack,) = task.lacks(Provided(MODEL, (objective,)))
    assert lack.remedy == f"name an objective of kind {wanted}"
    (absent,) = task.lacks(Provided(MODEL, ()))
    assert absent.what == f"does not train {objective.key!r}"


class Watching(Encoder):
    """Says yes where the mean of what it sees is above 100, with the more certainty the brighter it is."""

    def predict(
        self, objective: str, pictures: PictureSet, texts: Sequence[str] = (), candidates: Tensor | None = None
    ) -> Tensor:
        seen = pictures.frames(range(len(pictures))).float().flatten(1).mean(dim=1)
        self.views.append(seen)  # type: ignore[attr-defined]
        return torch.stack([torch.zeros_like(seen), (seen - 100) / 10], dim=1)


@pytest.mark.parametrize("sizes", ["native", "stretched"])
def test_several_crops_of_whole_pictures_are_refused(sizes: Any) -> None:
    """They would all be the same."""
    stage = Provided(replace(MODEL, sizes=sizes), (Recognize(classes=("no", "yes")),))
    task = ClassificationTask(objective="recognize", clips=3, crops=3)
    what = f"sees whole pictures (model.sizes: {sizes}), of which all crops would be the same"
    assert task.lacks(stage) == [Lack(what, "set model.sizes to 'fixed'", "crops", 1)]
    assert replace(task, crops=1).lacks(stage) == []
    assert task.lacks(Provided(MODEL, stage.objectives)) == []


def test_views_of_clips_and_crops_are_averaged() -> None:
    """A wide clip that is bright at one end of one side only: the mean of probabilities of six views."""
    frames = np.zeros((24, 32, 96, 3), dtype=np.uint8)
    frames[:8, :, 64:] = 255
    sample = Sample("a", "a", frames=frames, label="yes")
    made = encoder_of(Recognize(classes=("no", "yes")))
    encoder = Watching(made.chain, made.model, made.tokenizer, made.gather, made.device)
    object.__setattr__(encoder, "views", [])

    @dataclass(frozen=True)
    class OfOne(ClassificationTask):
        def picture_set(self, encoder: Encoder) -> PictureSet:
            return PictureSet.of([sample], "video", encoder.model.inputs)

    task = OfOne(objective="recognize", media="video", answer="label", clips=3, span=1 / 3, crops=3)
    scores = scores_of(task, encoder)
    assert [round(float(view)) for view in encoder.views] == [0, 0, 255, *[0] * 6]  # type: ignore[attr-defined]
    probability = (torch.sigmoid(torch.tensor(15.5)) + 8 * torch.sigmoid(torch.tensor(-10.0))) / 9
    assert scores["accuracy"] == float(probability > 0.5) == 0.0
    once = OfOne(objective="recognize", media="video", answer="label")
    encoder.views.clear()  # type: ignore[attr-defined]
    scores_of(once, encoder)
    assert [round(float(view)) for view in encoder.views] == [0], "the middle"  # type: ignore[attr-defined]

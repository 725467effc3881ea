"""Forms of servers, to the letter, on predictions made by hand."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from omnivl.data.sources.base import Sample
from omnivl.errors import DataError, UserError
from omnivl.tasks import (
    CaptionTask,
    ClassificationTask,
    GroundingTask,
    OptionsTask,
    PredictingTask,
    SegmentationTask,
    SentimentTask,
    VQATask,
)
from omnivl.tasks.predicting import identifiers
from omnivl.tasks.submissions import FORMATS, choose_format, with_identifiers


def sample(**meta: object) -> Sample:
    name = "-".join(str(value) for value in meta.values()) or "none"
    return Sample(key=name, where=f"a.tar:{name}", meta=meta)


def written(form: str, *pairs: tuple[dict[str, object], dict[str, Any]]) -> str:
    """The file of samples with these fields and predictions."""
    samples = [sample(**meta) for meta, _ in pairs]
    known = with_identifiers(form, samples)
    lines = [{**identifiers(one), **found, **own} for one, (_, found), own in zip(samples, pairs, known, strict=True)]
    return FORMATS[form].write(lines)


def test_json_lines() -> None:
    meta: dict[str, object] = {
        "question_id": 7,
        "identifier": "x",
        "worker_id": [1],
        "question": "?",
        "balanced_id": True,
    }
    found = {"answer": "a ü", "box": np.array([0.0, 0.5, 1.0, 1.0]), "mask": np.ones((1, 2), dtype=bool)}
    assert written("jsonl", (meta, found), ({}, {"number": np.float64(0.5)})) == (
        '{"where": "a.tar:7-x-[1]-?-True", "question_id": 7, "identifier": "x", "answer": "a \\u00fc", '
        '"box": [0.0, 0.5, 1.0, 1.0], "mask": {"size": [1, 2], "counts": [0, 2]}}\n'
        '{"where": "a.tar:none", "number": 0.5}\n'
    )


def test_vqa() -> None:
    made = written("vqa", ({"question_id": 458752000}, {"answer": "net"}), ({"question_id": "12"}, {"answer": "2"}))
    assert made == '[{"question_id": 458752000, "answer": "net"}, {"question_id": 12, "answer": "2"}]\n'


def test_gqa() -> None:
    made = written("gqa", ({"question_id": "201307251"}, {"answer": "yes"}), ({"question_id": 3}, {"answer": "car"}))
    assert made == '[{"questionId": "201307251", "prediction": "yes"}, {"questionId": "3", "prediction": "car"}]\n'


def test_nlvr2() -> None:
    made = written(
        "nlvr2",
        ({"identifier": "test1-0-0-0"}, {"answer": "false"}),
        ({"identifier": "test1-0-1-0"}, {"answer": "true"}),
    )
    assert made == "test1-0-0-0,False\ntest1-0-1-0,True\n"
    with pytest.raises(DataError, match=r"a\.tar:test1-0-0-0: the answer is 'maybe'; allowed in the format 'nlvr2'"):
        written("nlvr2", ({"identifier": "test1-0-0-0"}, {"answer": "maybe"}))


VCR = {
    "scores": np.log([0.1, 0.2, 0.3, 0.4]),
    "reason_scores": np.log([[0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]]),
}


def test_vcr() -> None:
    """Columns of rationales are by answer, then by rationale; values are probabilities."""
    header, row, end = written("vcr", ({"annot_id": "test-0"}, VCR)).split("\n")
    assert header == (
        "annot_id,answer_0,answer_1,answer_2,answer_3,"
        "rationale_conditioned_on_a0_0,rationale_conditioned_on_a0_1,rationale_conditioned_on_a0_2,"
        "rationale_conditioned_on_a0_3,rationale_conditioned_on_a1_0,rationale_conditioned_on_a1_1,"
        "rationale_conditioned_on_a1_2,rationale_conditioned_on_a1_3,rationale_conditioned_on_a2_0,"
        "rationale_conditioned_on_a2_1,rationale_conditioned_on_a2_2,rationale_conditioned_on_a2_3,"
        "rationale_conditioned_on_a3_0,rationale_conditioned_on_a3_1,rationale_conditioned_on_a3_2,"
        "rationale_conditioned_on_a3_3"
    )
    name, *shares = row.split(",")
    assert name == "test-0" and end == ""
    assert [float(one) for one in shares] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4, *[0.25] * 4, 0.4, 0.3, 0.2, 0.1, 0.7, 0.1, 0.1, 0.1]
    )
    few = {"scores": np.zeros(3), "reason_scores": np.zeros((3, 4))}
    with pytest.raises(DataError, match="got 3 options and 4 reasons; allowed in the format 'vcr': 4 each"):
        written("vcr", ({"annot_id": "test-0"}, few))


def test_visdial() -> None:
    """Ranks are the options' own, from 1; equal scores in the options' order: no rank twice."""
    made = written("visdial", ({"image_id": 568676, "round_id": 10}, {"scores": np.array([0.5, 2.0, -1.0, 0.5])}))
    assert made == '[{"image_id": 568676, "round_id": 10, "ranks": [2, 1, 4, 3]}]\n'


@pytest.mark.parametrize("form", ["coco", "nocaps"])
def test_captions(form: str) -> None:
    made = written(form, ({"image_id": 391895}, {"caption": 'a man said "hi"'}))
    assert json.loads(made) == [{"image_id": 391895, "caption": 'a man said "hi"'}]


@pytest.mark.parametrize(
    ("form", "meta", "message"),
    [
        ("vqa", {}, r"a\.tar:none: 'question_id' is nothing; allowed: a whole number, which the format 'vqa' needs"),
        ("vqa", {"question_id": "n7"}, r"'question_id' is 'n7'; allowed: a whole number, which the format 'vqa'"),
        ("gqa", {"image_id": 1}, "'question_id' is nothing; allowed: a text or a whole number"),
        ("nlvr2", {}, "'identifier' is nothing"),
        ("vcr", {}, "'annot_id' is nothing"),
        ("visdial", {"image_id": 1}, "'round_id' is nothing"),
        ("coco", {"image_id": "2.jpg"}, "'image_id' is '2.jpg'; allowed: a whole number, which the format 'coco'"),
        ("nocaps", {}, "'image_id' is nothing"),
    ],
)
def test_what_a_sample_lacks_is_named(form: str, meta: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_identifiers(form, [sample(**meta)])


def test_a_server_takes_one_prediction_for_each() -> None:
    twice = [sample(image_id=3, caption_id=number) for number in range(2)]
    with pytest.raises(DataError, match=r"a\.tar:3-1: image_id 3 is that of a\.tar:3-0 too; the format 'coco' takes"):
        with_identifiers("coco", twice)
    assert with_identifiers("jsonl", twice) == [{}, {}]
    rounds = [sample(image_id=3, round_id=number) for number in (1, 2)]
    assert with_identifiers("visdial", rounds) == [{"image_id": 3, "round_id": 1}, {"image_id": 3, "round_id": 2}]


@pytest.mark.parametrize(
    ("task", "forms"),
    [
        (VQATask(), ["vqa", "gqa", "nlvr2"]),
        (ClassificationTask(), ["vqa", "gqa", "nlvr2"]),
        (OptionsTask(), ["visdial"]),
        (OptionsTask(reasons="why"), ["vcr", "visdial"]),
        (CaptionTask(), ["coco", "nocaps"]),
        (GroundingTask(), []),
        (SegmentationTask(), []),
        (SentimentTask(), []),
    ],
    ids=lambda one: one.kind if isinstance(one, PredictingTask) else "",
)
def test_formats_fit_tasks(task: PredictingTask, forms: list[str]) -> None:
    for name in FORMATS:
        if name in ("jsonl", *forms):
            assert choose_format(name, task) is FORMATS[name]
        else:
            with pytest.raises(UserError, match=f"--format: got '{name}', which needs"):
                choose_format(name, task)


def test_a_format_that_does_not_fit_is_explained() -> None:
    with pytest.raises(UserError) as caught:
        choose_format("vqa", replace(GroundingTask(), name="expressions"))
    assert str(caught.value) == (
        "--format: got 'vqa', which needs 'answer', where task 'expressions' predicts 'box'; allowed are 'jsonl'; "
        "choose one"
    )
    with pytest.raises(UserError, match=r"needs 'reason_scores', where .* set the task's 'reasons'"):
        choose_format("vcr", OptionsTask())
    with pytest.raises(UserError, match=r"got 'vqaa'; allowed are 'jsonl', 'vqa', .*did you mean 'vqa'"):
        choose_format("vqaa", VQATask())

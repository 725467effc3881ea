"""VQA v2's files to samples that the objectives on answers read."""

import json

import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.convert import ConvertOptions, VqaReader, convert
from omnivl.data.sources import open_source
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError

ASKED = [
    {"image_id": 7, "question": "What is this? ", "question_id": 7000},
    {"image_id": 7, "question": "Is it red?", "question_id": 7001},
    {"image_id": 9, "question": "Who?", "question_id": 9000},
    {"image_id": 9, "question": "", "question_id": 9001},
    {"image_id": "9", "question": "Who?", "question_id": 9002},
    "who?",
]
ANSWERED = [
    {
        "question_id": 7000,
        "image_id": 7,
        "question_type": "what is this",
        "answer_type": "other",
        "multiple_choice_answer": "cat",
        "answers": [{"answer": word, "answer_confidence": "yes", "answer_id": 1} for word in ("cat", "cat", "a dog")],
    },
    {"question_id": 7001, "image_id": 7, "answers": []},
]


@pytest.fixture
def files(tmp_path, make_image):
    make_image(tmp_path / "images" / "COCO_train2014_000000000007.jpg")
    questions, annotations = tmp_path / "questions.json", tmp_path / "annotations.json"
    questions.write_text(json.dumps({"data_subtype": "train2014", "questions": ASKED}))
    annotations.write_text(json.dumps({"annotations": ANSWERED}))
    return questions, tmp_path / "images", annotations


def test_each_answered_question_is_a_sample(tmp_path, files):
    manifest = convert(VqaReader(*files, split="train"), tmp_path / "shards", ConvertOptions())
    assert (manifest.form, manifest.samples, dict(manifest.splits)) == ("vqa", 1, {"train": 1})
    assert dict(manifest.rejected) == {"missing_field": 2, "missing_caption": 1, "wrong_field": 1, "wrong_json": 1}
    entry = DataEntryConfig(source=str(tmp_path / "shards"), kind="image_text", text="question")
    sample = open_source(entry, seed=0).read(0)
    assert sample.meta["question"] == "What is this?"
    assert sample.meta["answers"] == ["cat", "cat", "a dog"]
    assert sample.meta["question_type"] == "what is this"
    assert sample.identity == "image 7"


def test_questions_alone_need_no_answers(files):
    questions, images, _ = files
    found = list(VqaReader(questions, images, picture="{image_id}.png").entries())
    assert [one.path.name for one in found[:3]] == ["7.png", "7.png", "9.png"]
    assert [one.detail for one in found if isinstance(one, Rejection)] == [
        "question is ''; allowed: a text",
        "image_id is '9'; allowed: a whole number",
        "is a str; allowed: an object",
    ]
    assert VqaReader(questions, images).count() == 6


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{image_id:012d}.png", ["000000000007.png", "000000000009.png"]),
        ("{image_id:03}/{image_id}.png", ["007/7.png", "009/9.png"]),
    ],
)
def test_names_of_pictures(files, pattern, names):
    questions, images, _ = files
    found = [one for one in VqaReader(questions, images, picture=pattern).entries() if not isinstance(one, Rejection)]
    assert [str(one.path.relative_to(images)) for one in found] == [names[0], names[0], names[1]]


def test_pictures_of_both_tests_have_one_name(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"data_subtype": "test-dev2015", "questions": ASKED[:1]}))
    (entry,) = VqaReader(file, tmp_path).entries()
    assert entry.path == tmp_path / "COCO_test2015_000000000007.jpg"


@pytest.mark.parametrize(
    ("content", "picture", "message"),
    [
        ({"annotations": []}, "{image_id}.jpg", "no list 'questions' at the top; allowed: a file of VQA v2"),
        ({"questions": []}, None, "no data_subtype, such as 'train2014', by which COCO's pictures are named"),
        ({"questions": []}, "a.jpg", "picture is 'a.jpg'; allowed: a file name with '{image_id}'; put it in"),
        ({"questions": []}, "{image_id:999999999d}.jpg", "allowed: a file name with '{image_id}'; put it in"),
        ({"questions": []}, "{image_id.__class__}", "allowed: a file name with '{image_id}'; put it in"),
        ({"questions": []}, "{image_id!r}", "allowed: a file name with '{image_id}'; put it in"),
        ({"questions": []}, "{image_id", "allowed: a file name with '{image_id}'; put it in"),
        (
            {"questions": []},
            "{image_id}{x}",
            "picture is '{image_id}{x}'; allowed: '{image_id}', or '{image_id:012d}' for 12 digits, and no other "
            "braces, but '{x}' is left; take them out",
        ),
        ({"questions": []}, "{image_id}{", "no other braces, but '{' is left"),
        ({"questions": []}, "{{image_id}}", "no other braces, but '{}' is left"),
        ({"questions": []}, "{image_id}{0}{}", "no other braces, but '{0}{}' is left"),
        (
            {"questions": [], "data_subtype": "train{x}"},
            None,
            "data_subtype is 'train{x}'; allowed: a name such as 'train2014'; mend it",
        ),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, picture, message):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        list(VqaReader(file, tmp_path, picture=picture).entries())
    assert message in str(caught.value)

"""``omnivl predict`` on a run folder with fresh weights: generated scenes, and a test set without answers."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from complete_run import write_complete_run
from tar_files import write_tar
from typer.testing import CliRunner

from launcher.cli import app
from omnivl.data.batch import DataKind
from omnivl.data.config import DataEntryConfig
from omnivl.data.sources import open_source
from omnivl.errors import DataError, UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration

PLAN = f"""
name: heads
model: {{preset: {ROOT / "configs" / "models" / "debug.yaml"}, text_length: 64}}
stages:
  - name: heads
    steps: 5
    data:
      - source: scenes
        kind: image_text
        where: {{task: [dialogue]}}
        fields:
          {{answers: answers, options: options, option: option, rationales: rationales, rationale: rationale,
            answer: answer, image_caption: image_caption, history: history}}
    objectives:
      - {{kind: vqa, answers: ["true", "false"]}}
      - choose
      - {{kind: choose, name: why, field: rationales, index: rationale, given: [answer]}}
      - {{kind: choose, name: turn, most_options: 10, context: [image_caption, history]}}
      - lm
      - {{kind: univlc, queue_size: 8}}
    optimizer: {{warmup_steps: 1}}
    evaluate:
      tasks:
        - {{kind: vqa, source: scenes, where: {{task: [questions]}}, max_samples: 6, predictions: true}}
        - {{kind: options, name: vcr, reasons: why, where: {{task: [reasons]}}, max_samples: 5, predictions: true}}
        - {{kind: options, name: visdial, objective: turn, where: {{task: [dialogue]}}, max_samples: 5}}
        - {{kind: classification, name: nlvr2, pictures: [left.png, right.png], where: {{task: [pairs]}}}}
        - {{kind: caption, source: scenes, where: {{task: [expressions]}}, max_samples: 3}}
        - {{kind: retrieval, name: all, source: scenes, max_samples: 3}}
"""
UNSAID = ("answer", "answers", "option", "rationale", "relevance")
"""Fields that a test set keeps to itself."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_complete_run(tmp_path_factory.mktemp("runs") / "heads", PLAN, stages=1, spread=5)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "100"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def write_test_set(path: Path, task: str, count: int, *, kind: DataKind = "image_text", text: bool = True) -> Path:
    """Shards of generated scenes as a test set has them: with identifiers, and without anything that is right."""
    source = open_source(DataEntryConfig(source="scenes", kind=kind, where={"task": (task,)}), seed=3)
    members: dict[str, bytes] = {}
    for index in range(count):
        sample = source.read(index)
        fields = {name: value for name, value in sample.meta.items() if name not in UNSAID}
        fields |= {"image_id": 100 + index, "annot_id": f"test-{index}", "identifier": f"test1-{index}-0-0"}
        fields |= {"caption": sample.captions[0]} if text else {}
        name = f"s{index:03d}"
        members[f"{name}.json"] = json.dumps(fields).encode()
        if sample.frames is not None:
            members[f"{name}.png"] = cv2.imencode(".png", np.ascontiguousarray(sample.frames[0][..., ::-1]))[
                1
            ].tobytes()
        members |= {f"{name}.{member}": data for member, data in sample.members.items()}
    return write_tar(path / f"{task}.tar", members)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_keeps_what_predict_says(folder: Path, tmp_path: Path) -> None:
    """Files are numbered in the order of the tasks that ask for one."""
    run("evaluate", folder, "--tasks", "vqa,vcr", "--out", tmp_path / "figures.json")
    kept = lines_of(tmp_path / "figures-predictions.jsonl"), lines_of(tmp_path / "figures-predictions-2.jsonl")
    for name, lines in zip(("vqa", "vcr"), kept, strict=True):
        out = tmp_path / f"{name}.jsonl"
        said = run("predict", folder, "--task", name, "--out", out)
        assert said == f"{out}: {len(lines)} predictions of stage heads, task {name}, format jsonl\n"
        right = {"truth", "right", "score", "rank", "reason_right"}
        assert lines_of(out) == [{field: one[field] for field in one if field not in right} for one in lines]
        assert all({"truth", "right"} <= set(one) for one in lines)


def test_questions_of_a_test_set(folder: Path, tmp_path: Path) -> None:
    """All of its samples, more than the plan's task takes."""
    data, out = write_test_set(tmp_path, "questions", 9), tmp_path / "out" / "vqa.json"
    with pytest.raises(DataError, match="has no list 'answers'"):
        run("evaluate", folder, "--tasks", "vqa", "--set", f"vqa.source={data}", "--set", "vqa.where={}")
    run("predict", folder, "--task", "vqa", "--data", data, "--format", "vqa", "--out", out)
    answers = json.loads(out.read_text())
    assert [one["question_id"] for one in answers] == list(range(9))
    assert all(set(one) == {"question_id", "answer"} and one["answer"] in ("true", "false") for one in answers)
    run("predict", folder, "--task", "vqa", "--data", data, "--format", "gqa", "--out", out)
    assert json.loads(out.read_text())[4] == {"questionId": "4", "prediction": answers[4]["answer"]}
    few = ("--set", "vqa.max_samples=4", "--where", "{image_id: [101, 102, 103, 104, 105]}")
    run("predict", folder, "--task", "vqa", "--data", data, "--format", "vqa", "--out", out, *few)
    assert [one["question_id"] for one in json.loads(out.read_text())] == [1, 2, 3, 4]


def test_choices_of_test_sets(folder: Path, tmp_path: Path) -> None:
    data, out = write_test_set(tmp_path, "reasons", 4), tmp_path / "vcr.csv"
    run("predict", folder, "--task", "vcr", "--data", data, "--format", "vcr", "--out", out)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["annot_id"] for row in rows] == [f"test-{number}" for number in range(4)]
    assert len(rows[0]) == 21
    for row in rows:
        for group in ("answer", *(f"rationale_conditioned_on_a{answer}" for answer in range(4))):
            assert sum(float(row[f"{group}_{place}"]) for place in range(4)) == pytest.approx(1)
        given = {tuple(row[f"rationale_conditioned_on_a{answer}_{place}"] for place in range(4)) for answer in range(4)}
        assert len(given) > 1, "a reason's score depends on the answer"
    run(
        "predict",
        folder,
        "--task",
        "visdial",
        "--data",
        write_test_set(tmp_path, "dialogue", 4),
        "--format",
        "visdial",
        "--out",
        out,
    )
    rounds = json.loads(out.read_text())
    assert [one["image_id"] for one in rounds] == [100, 101, 102, 103]
    assert all(sorted(one["ranks"]) == list(range(1, 11)) and 1 <= one["round_id"] <= 4 for one in rounds)


def test_pairs_and_captions_of_test_sets(folder: Path, tmp_path: Path) -> None:
    """Pictures to be described have no text at all."""
    pairs, out = write_test_set(tmp_path, "pairs", 5, kind="images_text"), tmp_path / "answers.csv"
    run("predict", folder, "--task", "nlvr2", "--data", pairs, "--format", "nlvr2", "--out", out)
    rows = [line.split(",") for line in out.read_text().splitlines()]
    assert [name for name, _ in rows] == [f"test1-{number}-0-0" for number in range(5)]
    assert {answer for _, answer in rows} <= {"True", "False"}
    pictures = write_test_set(tmp_path, "expressions", 5, text=False)
    for form in ("coco", "nocaps"):
        run("predict", folder, "--task", "caption", "--data", pictures, "--format", form, "--out", out)
        captions = json.loads(out.read_text())
        assert [one["image_id"] for one in captions] == [100, 101, 102, 103, 104]
        assert all(set(one) == {"image_id", "caption"} and isinstance(one["caption"], str) for one in captions)


def test_mistakes_are_named_before_anything_is_computed(folder: Path, tmp_path: Path) -> None:
    def mistaken(*arguments: object) -> str:
        with pytest.raises((UserError, DataError)) as caught:
            run("predict", folder, "--out", tmp_path / "out.json", *arguments)
        return str(caught.value)

    assert mistaken("--task", "vqaa").startswith("--task: got 'vqaa'; allowed are 'vqa', 'vcr', ")
    assert mistaken("--task", "options") == (
        "--task: got 'options'; allowed is one task, and it stands for 'vcr', 'visdial'; name one of them"
    )
    assert mistaken("--task", "all").startswith(
        "--task: got 'all', which is of kind 'retrieval' and predicts nothing without what is right; allowed are tasks "
        "of the kinds 'neighbors', 'caption', 'vqa', "
    )
    assert mistaken("--task", "vqa", "--format", "coco").startswith("--format: got 'coco', which needs 'caption'")
    assert mistaken("--task", "grounding").endswith(
        "train one (add the objective 'locate'), or name another one with --task"
    )
    assert "'identifier' is nothing; allowed: a text or a whole number, which the format 'nlvr2' needs" in mistaken(
        "--task", "vqa", "--format", "nlvr2"
    )
    assert not (tmp_path / "out.json").exists()

"""Filters of a plan may be written as numbers, or as one value."""

from pathlib import Path

import pytest
from small_plan import HEAD

from engine.errors import PlanError
from engine.plan.parse import load_plan

PLAN = (
    HEAD
    + """    data: [{{source: emoji, kind: image_text, where: {where}}}]
    objectives: [{{kind: univlc, queue_size: 8}}]
    evaluate: {{tasks: [{{kind: retrieval, where: {where}}}]}}
"""
)


@pytest.fixture
def write(tmp_path):
    def write(where: str) -> Path:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cat", "dog"]
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        path = tmp_path / "plan.yaml"
        path.write_text(PLAN.format(vocabulary=tmp_path / "vocab.txt", where=where), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{year: [2019, 2020]}", {"year": ("2019", "2020")}),
        ("{width: '>= 256'}", {"width": (">= 256",)}),
        ("{split: train, ratio: 0.5, clean: true}", {"split": ("train",), "ratio": ("0.5",), "clean": ("true",)}),
        ("{split: [train, val]}", {"split": ("train", "val")}),
    ],
)
def test_numbers_and_single_values(write, written, read):
    (stage,) = load_plan(write(written)).stages
    assert stage.data[0].where == read
    assert stage.evaluate.tasks[0].where == read
    (stage,) = load_plan(write("{}"), [f"stages.one.data.0.where={written}"]).stages
    assert stage.data[0].where == read


@pytest.mark.parametrize("written", ["{year: [[2019]]}", "{year: {min: 3}}", "{year: null}", "[year]"])
def test_other_values_are_refused_as_before(write, written):
    with pytest.raises(PlanError, match="where"):
        load_plan(write(written))

"""``epochs`` instead of ``steps``, and the warm-up that is longer than a stage."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from tar_files import write_tar

from engine.errors import PlanError
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.plan.warnings import warnings_of

ONE = "{source: SHARDS, kind: image_text}"


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def shards(folder: Path, split: str, count: int) -> None:
    """Pictures with texts of one split, in two shards."""
    for shard in range(2):
        sample = {"png": picture(), "txt": b"a text", "json": json.dumps({"split": split}).encode()}
        names = [f"{split}{index:04d}" for index in range(shard, count, 2)]
        members = {f"{name}.{extension}": content for name in names for extension, content in sample.items()}
        write_tar(folder / f"{split}-{shard}.tar", members)


def plan(folder: Path, length: str, data: str = ONE, *, processes: int | None = None, more: str = "") -> Plan:
    text = f"""
name: x
model: {{preset: tiny}}
batch: {{micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}}
loader: {{index_cache: {folder}}}
stages:
  - {{name: a, {length}, data: [{data.replace("SHARDS", str(folder / "*.tar"))}], objectives: [mlm]{more}}}
"""
    return parse_plan(text, "p", world_size=processes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards(tmp_path, "train", 30)
    shards(tmp_path, "val", 11)
    return tmp_path


@pytest.mark.parametrize(
    ("epochs", "data", "processes", "steps"),
    [
        ("1", ONE, None, 6),  # 41 samples, 8 a step: 5.125
        ("2", ONE, None, 11),  # 10.25
        ("0.5", ONE, None, 3),  # 2.56
        ("0.001", ONE, None, 1),
        ("1", ONE, 3, 2),  # 24 a step
        ("4", "{source: SHARDS, kind: image_text, where: {split: [train]}}", 1, 15),  # 120 / 8
        ("4", "{source: SHARDS, kind: image_text, where: {split: [val]}}", 2, 3),  # 44 / 16
        ("1", ONE + ", {source: emoji, kind: image_text, weight: 3}", None, 21),  # a quarter of the samples: 41 / 2
        (
            "1",
            ONE.replace("}", ", weight: 0}") + ", {source: emoji, kind: image_text, where: {split: [train]}}",
            1,
            400,
        ),
    ],
)
def test_steps_are_worked_out(folder: Path, epochs: str, data: str, processes: int | None, steps: int) -> None:
    (stage,) = plan(folder, f"epochs: {epochs}", data, processes=processes).stages
    if "emoji" in data and "weight: 0" in data:  # the first entry with a weight counts: drawings of a split
        from omnivl.data.sources import open_source

        steps = -(-len(open_source(stage.data[1], seed=0)) // 8)
    assert stage.steps == steps


def test_a_run_records_steps(folder: Path) -> None:
    """The resolved plan says steps alone, and reads as the same plan, where the data has changed meanwhile as well."""
    read = plan(folder, "epochs: 2")
    text = read.to_yaml()
    assert "epochs: null" in text
    assert "steps: 11" in text
    shards(folder, "more", 50)
    assert parse_plan(text) == read


@pytest.mark.parametrize(
    ("length", "data", "told"),
    [
        (
            "epochs: 2, steps: 3",
            ONE,
            "p:7: stages.0.epochs: got 2 beside steps, 3; allowed one of the two; take one out",
        ),
        ("epochs: 0", ONE, "stages.0.epochs: got 0; allowed more than 0"),
        ("epochs: two", ONE, "stages.0.epochs: got 'two'; allowed a number or null"),
        ("epochs: 1e9", ONE, "stages.0.epochs: got 1e+09, which are 5,125,000,000 steps"),
        (
            "epochs: 2",
            "{source: 'https://example.org/{0..9}.tar', kind: image_text, name: web}",
            "stages.0.epochs: got 2 of data that has no known number of samples (data entry 'web': a stream is read from "
            "front to back); allowed samples that can be counted; give steps instead",
        ),
        (
            "epochs: 2",
            "{source: nowhere/*.tar, kind: image_text}",
            "stages.0.epochs: got 2 of data that has no known number",
        ),
        ("epochs: null", ONE, "stages.0.steps: got nothing; allowed an integer; add 'steps'"),
        ("num_train_epochs: 3", ONE, "write epochs"),
    ],
)
def test_what_is_no_number_of_epochs(folder: Path, length: str, data: str, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(folder, length, data)
    assert told in "\n".join(caught.value.problems)
    assert sum("epochs:" in problem for problem in caught.value.problems) <= 1


def test_a_warm_up_longer_than_the_stage_is_a_warning(folder: Path) -> None:
    """Step 2 of 4 warm-up steps has half of the rate."""
    read = plan(folder, "steps: 2", more=", optimizer: {warmup_steps: 4, lr: 1e-3}")
    (warning,) = warnings_of(read)
    assert warning == (
        "stages.a.optimizer.warmup_steps: 4 are more than the stage's 2 steps: the learning rate ends at 0.0005, before "
        "it reaches 0.001"
    )
    assert warnings_of(plan(folder, "steps: 4", more=", optimizer: {warmup_steps: 4}")) == []

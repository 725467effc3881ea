"""Names of other projects lead to the field here."""

import re
from typing import Any

import pytest

from engine.errors import PlanError
from engine.plan.other_names import _FIELDS, _KINDS
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan, StagePlan
from engine.plan.schema import annotation_at, kinds

STAGE = "{{name: a, steps: 2, data: [{data}], objectives: [{objective}]{more}}}"


def told(*, top: str = "", more: str = "", data: str = "", objective: str = "kind: univlc") -> str:
    stage = STAGE.format(
        data="{source: emoji, kind: image_text" + data + "}", objective="{" + objective + "}", more=more
    )
    with pytest.raises(PlanError) as caught:
        parse_plan(f"name: x\nmodel: {{preset: tiny}}\n{top}\nstages:\n  - {stage}\n", "p.yaml")
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ({"more": ", learning_rate: 1e-3"}, "stages.0.learning_rate: got an unknown key; .*; write optimizer.lr$"),
        ({"more": ", optimizer: {learning_rate: 1e-3}"}, "optimizer.learning_rate: got an unknown key; .*; write lr$"),
        ({"more": ", optimizer: {warmup: 3}"}, "optimizer.warmup: .*; write warmup_steps$"),
        ({"more": ", max_steps: 3"}, "stages.0.max_steps: .*; write steps$"),
        ({"more": ", batch_size: 3"}, "stages.0.batch_size: .*; write batch.micro_batch_size_per_gpu$"),
        ({"more": ", batch: {batch_size: 3}"}, "batch.batch_size: .*; write micro_batch_size_per_gpu$"),
        ({"top": "batch_size: 3"}, "batch_size: .*; write batch.micro_batch_size_per_gpu$"),
        ({"top": "fp16: true"}, "fp16: .*; write parallel.precision$"),
        ({"top": "num_workers: 3"}, "num_workers: .*; write loader.num_workers$"),
        ({"top": "parallel: {bf16: true}"}, "parallel.bf16: .*; write precision$"),
        ({"data": ", path: x"}, "data.0.path: .*; write source$"),
        ({"objective": "kind: contrastive"}, "objectives.0.kind: got 'contrastive'; .*; write univlc$"),
        ({"objective": "kind: captioning"}, "objectives.0.kind: got 'captioning'; .*; write lm$"),
        ({"top": "learning_rate: 1e-3"}, "learning_rate: .*; write optimizer.lr in a stage: stages.0.optimizer.lr$"),
        ({"top": "optimizer: {lr: 1e-3}"}, "optimizer: .*; write it in a stage: stages.0.optimizer$"),
        ({"top": "epochs: 3"}, "epochs: got an unknown key; .*; write it in a stage: stages.0.epochs$"),
        ({"top": "num_epochs: 3"}, "num_epochs: .*; write epochs in a stage: stages.0.epochs$"),
        ({"top": "itc: 1"}, r"itc: got an unknown key; .*; write objectives: \[itc\] in the stage$"),
        ({"more": ", univlc: 1"}, r"stages.0.univlc: .*; write objectives: \[univlc\] in the stage$"),
        ({"more": ", seed: 1"}, "stages.0.seed: .*; write it at the plan's top, beside 'stages': seed$"),
        ({"objective": "kind: univlc, univlc: 1"}, "objectives.0.univlc: got an unknown key; "),  # called as its kind
        ({"more": ", learning_rat: 1e-3"}, "learning_rat: got an unknown key; .*; remove it$"),
    ],
)
def test_a_name_of_others_leads_to_the_field(where: dict[str, str], change: str) -> None:
    found = told(**where)
    assert re.search(change, found, re.MULTILINE), found


@pytest.mark.parametrize("target", sorted(set(_FIELDS) - {"model.preset"}))
def test_every_field_that_is_named_exists(target: str) -> None:
    parts = target.split(".")
    path = ("data", 0, *parts[1:]) if parts[0] == "data" and len(parts) > 1 else tuple(parts)
    tree: Any = {}
    for part in reversed(path):
        tree = [tree] if part == 0 else {part: tree}
    assert any(annotation_at(cls, tree, path) is not None for cls in (Plan, StagePlan))


def test_every_kind_that_is_named_exists() -> None:
    assert set(_KINDS) <= set(kinds(annotation_at(StagePlan, {"objectives": [{}]}, ("objectives", 0))))

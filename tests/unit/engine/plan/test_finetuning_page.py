"""Every line of the page on fine-tuning is one that a plan may have, and does what it says it does."""

import re
from typing import Any

import pytest
import yaml
from documentation import ROOT, blocks

from engine.plan.parse import parse_plan
from engine.plan.plan import Plan

PAGE = ROOT / "docs" / "finetuning.md"
ROWS = [row.split("|")[1:3] for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")][1:]
LINES = [
    pytest.param(code, id=wanted.strip()) for wanted, lines in ROWS for code in re.findall(r"`([a-z_]+: .*?)`", lines)
]
PLAN = """
name: tuned
model: {preset: tiny}
batch: {micro_batch_size_per_gpu: 4}
checkpoint: {keep_best: "retrieval/text->image R@1"}
stages:
  - name: pretrain
    steps: 2
    data: [{source: emoji, kind: image_text}]
    objectives: [univlc, vlm]
  - name: tuned
    steps: 2
    init_from: pretrain
    data: [{source: scenes, kind: image_text, fields: [answers], where: {task: [questions]}}]
    objectives: [univlc, vlm]
    evaluate: {tasks: [retrieval]}
"""


def plan_with(line: str) -> Plan:
    """The plan with a line in its last stage, or at its top."""
    tree: dict[str, Any] = yaml.safe_load(PLAN)
    ((key, value),) = yaml.safe_load(line).items()
    if key == "checkpoint":
        tree[key].update(value)
    else:
        stage = tree["stages"][1]
        stage[key] = value
        if key == "epochs":
            del stage["steps"]
        if key == "weights":
            del stage["init_from"]
    return parse_plan(yaml.safe_dump(tree), "page")


def test_rows_are_found() -> None:
    assert len(ROWS) > 14
    assert len(LINES) >= len(ROWS) - 1


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_table_are_of_a_plan(line: str) -> None:
    before, after = plan_with("name: tuned"), plan_with(line)
    assert after != before or line == "init_from: pretrain"


@pytest.mark.parametrize("block", blocks(PAGE, "yaml"))
def test_blocks_are_of_a_plan(block: str) -> None:
    optimizer = plan_with(block).stages[1].optimizer
    assert (optimizer.lr, optimizer.new_head_lr_scale) == (5e-6, 50)

"""Mutated plans, overrides, sweeps, machines, clusters, tasks and model files end in a message that names the mistake."""

from pathlib import Path

import pytest
from mutated_files import case_of, findings

from engine.errors import PlanError
from engine.plan.parse import load_plan, parse_plan
from omnivl.errors import UserError, printable

SEED, COUNT, FULL_COUNT = 2, 700, 2_000
PLAN = """name: run
model: {preset: tiny, vocab_size: 100}
parallel: {host: zero, precision: fp32}
stages:
  - {name: one, steps: 3, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""
KEPT = ((0, 71), (0, 326), (0, 505), (0, 709), (0, 907), (0, 1286), (1, 2747))
"""Seeds and numbers of cases that once ended in a traceback, or in escape sequences on the terminal."""


@pytest.mark.parametrize(("seed", "number"), KEPT)
def test_what_once_went_wrong(seed: int, number: int) -> None:
    assert list(findings(range(number, number + 1), seed)) == []


@pytest.mark.parametrize("numbers", [range(COUNT), pytest.param(range(COUNT, FULL_COUNT), marks=pytest.mark.full)])
def test_mutated_files_are_read_or_refused_by_name(numbers: range) -> None:
    found = [(SEED, finding.number, finding.case, finding.said) for finding in findings(numbers, SEED)]
    assert found == []


def test_cases_are_the_same_everywhere() -> None:
    assert case_of(5, 3) == case_of(5, 3) != case_of(6, 3)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.vision_layers=9223372036854775807", "got 9223372036854775807; allowed at most 1,000"),
        ("model.vocab_size=1000000000000000000", "got 1000000000000000000; allowed at most 10,000,000"),
        ("stages.0.objectives.0.queue_size=1000000000000000000", "got 1000000000000000000; allowed at most 10,000,000"),
        ("stages.0.steps=1e30", "got 1e+30; allowed at most 1,000,000,000"),
        ("stages.0.optimizer.lr=1e300", "got 1e+300; allowed at most 100"),
        ("launch.processes=1000000000", "got 1000000000; allowed at most 1,024"),
        ("loader.num_workers=1000000000", "got 1000000000; allowed at most 1,024"),
        ("model.ffn={kind: limoe, num_experts: 1000000000}", "got 1000000000; allowed at most 4,096"),
        ("seed=-1", "got -1; allowed from 0 to 9,223,372,036,854,775,807"),
        ("model.momentum={decay: 1e-300}", "got 1e-300; allowed 0, or 1e-15 or more"),
        ("parallel={host: pipeline, pipeline_stages: 0}", "got 0; allowed 2 or more"),
        ("model.ffn={kind: mome_limoe, pools: {text: 99999}}", "got 99999; allowed at most 4,096"),
    ],
)
def test_numbers_beyond_every_machine(override: str, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan(PLAN, "p", [override])
    assert any(f"{told}; change the number" in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("part", ["9" * 5000, "\udcff", "a." * 40, "²", ""])
def test_a_path_of_an_override_that_leads_nowhere(part: str) -> None:
    with pytest.raises(PlanError):
        parse_plan(PLAN, "p", [f"stages.{part}.steps=1"])


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", ".", "x" * 300])
def test_a_plan_that_is_no_file(path: str) -> None:
    with pytest.raises(PlanError, match="got a file that cannot be read"):
        load_plan(path)


@pytest.mark.parametrize(("field", "suffix"), [("tokenizer", ".txt"), ("model.preset", ".yaml")])
def test_files_without_end_that_a_plan_names(field: str, suffix: str, tmp_path: Path) -> None:
    link = tmp_path / f"endless{suffix}"
    link.symlink_to("/dev/zero")
    with pytest.raises(PlanError, match=r"no regular file|no plain file"):
        parse_plan(PLAN.replace(", vocab_size: 100", ""), "p", [f"{field}={link}"])


def test_a_tokenizer_folder_with_a_file_without_end(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(PlanError, match="no plain file"):
        parse_plan(PLAN.replace(", vocab_size: 100", ""), "p", [f"tokenizer={tmp_path}"])


def test_messages_are_printable() -> None:
    assert str(UserError("a\x1b[31m \u202e b\nc\td é")) == "a\\x1b[31m \\u202e b\nc\td é"
    assert printable("plain é 漢字 🙂") == "plain é 漢字 🙂"

"""The cases of the benchmark of estimates are plans that can run."""

import pytest

from benchmarks.estimate import CASES, PLAN, STAGE, Case
from benchmarks.estimate_process import read_stage
from engine.estimate.hardware import load_hardware


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} on {case.processes}")
def test_a_case_is_a_plan(case: Case) -> None:
    stage, _ = read_stage(PLAN, STAGE, case.overrides(4), case.processes, load_hardware("h100"))
    assert stage.parallel.precision == "bf16", "settled for the machine"
    assert {entry.kind for entry in stage.data} == {"image_text"}
    assert stage.batch.gradient_accumulation_steps == case.accumulation
    assert stage.parallel.host == case.parallel["host"]

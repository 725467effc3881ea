"""A plan that states its global batch runs on every number of processes that divides it."""

from pathlib import Path
from typing import Any

import pytest

from engine.errors import PlanError
from engine.plan.parse import load_plan, parse_plan
from engine.plan.yaml import read_yaml

PLAN = """name: run
model: {preset: tiny, vocab_size: 100}
parallel: {host: plain, precision: fp32}
stages:
  - {name: one, steps: 3, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""


@pytest.mark.parametrize(
    ("batch", "processes", "worked_out"),
    [
        ("{micro_batch_size_per_gpu: 4, gradient_accumulation_steps: auto, global_batch_size: 64}", 2, (4, 8)),
        ("{micro_batch_size_per_gpu: 4, gradient_accumulation_steps: auto, global_batch_size: 64}", 16, (4, 1)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, global_batch_size: 8192}", 64, (32, 4)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, global_batch_size: 24}", 4, (6, 1)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, global_batch_size: 111}", 1, (3, 37)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: 2, global_batch_size: 64}", 4, (8, 2)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto}", 4, (32, 1)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, global_batch_size: 8}", None, (8, 1)),
        ("{micro_batch_size_per_gpu: 64, gradient_accumulation_steps: auto, global_batch_size: 4096}", 128, (32, 1)),
        ("{micro_batch_size_per_gpu: 64, gradient_accumulation_steps: auto, global_batch_size: 4096}", 4096, (1, 1)),
        ("{micro_batch_size_per_gpu: 100, gradient_accumulation_steps: auto, global_batch_size: 1600}", 64, (25, 1)),
        ("{micro_batch_size_per_gpu: 100, gradient_accumulation_steps: auto, global_batch_size: 1600}", 10, (80, 2)),
        ("{gradient_accumulation_steps: auto, global_batch_size: 96}", 2, (24, 2)),
        ("{global_batch_size: 8192}", 64, (32, 4)),
        ("{global_batch_size: 48}", 3, (16, 1)),
        ("{micro_batch_size_per_gpu: auto, gradient_accumulation_steps: 2, global_batch_size: 512}", 2, (128, 2)),
    ],
)
def test_what_is_left_open_is_worked_out(batch: str, processes: int | None, worked_out: tuple[int, int]) -> None:
    plan = parse_plan(PLAN, "p", [f"batch={batch}"], processes)
    for one in (plan.batch, plan.stages[0].batch):
        assert (one.micro_batch_size_per_gpu, one.gradient_accumulation_steps) == worked_out


def test_replicas_of_a_pipeline_share_the_batch() -> None:
    batch = "batch={micro_batch_size_per_gpu: 4, gradient_accumulation_steps: auto, global_batch_size: 64}"
    plan = parse_plan(PLAN, "p", ["parallel={host: pipeline, pipeline_stages: 2, precision: fp32}", batch], 8)
    assert plan.stages[0].batch.gradient_accumulation_steps == 4


def test_processes_that_do_not_divide_the_batch_are_told() -> None:
    batch = "batch={micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, global_batch_size: 64}"
    with pytest.raises(PlanError, match=r"global_batch_size: got 64 for 3 processes; .* take 2 or 4 processes"):
        parse_plan(PLAN, "p", [batch], 3)


@pytest.mark.parametrize("size", [10**29, 10**18 + 9, 0, -1])
def test_numbers_that_are_no_batch_are_refused_at_once(size: int) -> None:
    batch = f"batch={{micro_batch_size_per_gpu: {size}, gradient_accumulation_steps: auto, global_batch_size: {size}}}"
    with pytest.raises(PlanError, match=f"batch.micro_batch_size_per_gpu: got {size}; allowed ") as caught:
        parse_plan(PLAN, "p", [batch], 7)
    assert "gradient_accumulation_steps: got" not in str(caught.value)


def test_another_word_is_told() -> None:
    with pytest.raises(PlanError, match=r"got 'many'; allowed 'auto' or an integer"):
        parse_plan(PLAN, "p", ["batch.micro_batch_size_per_gpu=many"])


PLANS = sorted((Path(__file__).parents[4] / "configs" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.stem)
@pytest.mark.parametrize(
    "processes", [3, 8, 128, *(pytest.param(one, marks=pytest.mark.full) for one in (1, 2, 7, 12, 16, 64, 256, 512))]
)
def test_every_plan_runs_on_every_number_of_processes_that_divides_its_batch(plan: Path, processes: int) -> None:
    """Another number is refused, with the batch as the only mistake."""
    batches = {stage["batch"].get("global_batch_size") for stage in whole_stages(plan)}
    wanted = {size for size in batches if size is not None}
    if all(size % processes == 0 for size in wanted):
        read = load_plan(plan, (), processes)
        for stage in read.stages:
            assert stage.batch.global_batch_size in (None, stage.samples_per_step(processes))
        return
    with pytest.raises(PlanError) as caught:
        load_plan(plan, (), processes)
    told = [problem.split(": ")[1] for problem in caught.value.problems]
    assert told and all(one.endswith("batch.global_batch_size") for one in told)


def whole_stages(plan: Path) -> list[dict[str, Any]]:
    """The stages of a plan's file, each with its whole batch section."""
    tree = read_yaml(plan.read_text(encoding="utf-8")).tree
    return [{"batch": {**tree.get("batch", {}), **stage.get("batch", {})}} for stage in tree["stages"]]

"""A plan that states its global batch runs on every number of processes that divides it."""

import pytest

from engine.errors import PlanError
from engine.plan.parse import load_plan, parse_plan

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
    with pytest.raises(PlanError, match=r"global_batch_size: got 64; allowed 63 = .* x 3 processes"):
        parse_plan(PLAN, "p", [batch], 3)


def test_another_word_is_told() -> None:
    with pytest.raises(PlanError, match=r"got 'many'; allowed 'auto' or an integer"):
        parse_plan(PLAN, "p", ["batch.micro_batch_size_per_gpu=many"])


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_a_plan_of_a_paper_runs_on_any_number_of_processes_that_divides_its_batch(processes: int) -> None:
    plan = load_plan("configs/plans/vilt_b32.yaml", (), processes)
    assert {stage.samples_per_step(processes) for stage in plan.stages} == {4096}

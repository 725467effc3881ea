"""The comparison of downstream tasks: its figures are those of the plan, and its variants are plans."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from benchmarks.measure import Spread
from benchmarks.plan_runs import PlanRun
from benchmarks.tasks import (
    FIGURES,
    PICTURE_ALONE,
    PLANS,
    PRETRAINED,
    REPEATED,
    SCRATCH,
    TEXT_ALONE,
    Figure,
    _before,
    _row,
    overrides_of,
    page_of,
)
from engine.plan.parse import load_plan
from omnivl.tasks import Score

BEFORE = {"tasks": ["pretrain", "pretrain_clips"], "few_shot": ["naming", "own_names"]}
TASKS, FEW_SHOT = PLANS
STAGES = [stage.name for path in PLANS for stage in load_plan(path).stages if stage.name not in BEFORE[path.stem]]


def test_every_figure_is_one_of_the_plan_and_every_stage_has_one() -> None:
    tasks = {stage.name: stage.evaluate.tasks for path in PLANS for stage in load_plan(path).stages}
    assert len(tasks) == sum(len(load_plan(path).stages) for path in PLANS), "stages of plans have names of their own"
    for figure in FIGURES:
        found = [
            task
            for task in tasks[figure.stage]
            if figure.score.startswith(f"{task.name} ")
            and any(fnmatchcase(figure.score.removeprefix(f"{task.name} "), name) for name in task.figures)
        ]
        assert len(found) == 1, figure
    assert {figure.stage for figure in FIGURES} == set(STAGES)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", [SCRATCH, TEXT_ALONE, PICTURE_ALONE])
def test_variants_are_plans(variant: str, path: Path) -> None:
    assert overrides_of(path, PRETRAINED) == []
    plan = load_plan(path, overrides_of(path, variant))
    hidden = {TEXT_ALONE: ("picture",), PICTURE_ALONE: ("text",)}.get(variant, ())
    for stage in plan.stages[2:]:
        assert stage.init_from is None
        assert all(entry.where.get("hide", ()) == hidden for entry in stage.data)
        assert all(task.where.get("hide", ()) == hidden for task in stage.evaluate.tasks)
    assert plan.stages[:2] == load_plan(path).stages[:2]


def test_pretraining_comes_first_and_once() -> None:
    assert _before(TASKS, ["questions", "clips", "pairs", "statements"]) == BEFORE["tasks"]
    assert _before(TASKS, ["questions"]) == ["pretrain"] and set(REPEATED) < set(STAGES)
    assert _before(FEW_SHOT, ["binding"]) == BEFORE["few_shot"]


def test_runs_of_two_plans_count_as_one() -> None:
    figures = Figure("pairs", "t m", "a task"), Figure("binding", "t m", "a task")
    found = PlanRun.together([made(value, figure) for value, figure in zip((0.3, 0.4), figures, strict=True)])
    assert [found.scores[figure.stage]["t m"].value for figure in figures] == [0.3, 0.4]
    assert (found.seconds, found.cpu_seconds) == (2.0, 2.0)


def made(value: float, figure: Figure) -> PlanRun:
    score = Score("t", "m", value, 0.25, None, 10, lower_is_better=figure.score.endswith("MAE"))
    return PlanRun({figure.stage: {figure.score: score}}, 1.0, 1.0, {})


@pytest.mark.parametrize(
    ("task", "metric", "with_it", "without", "said"),
    [
        ("questions", "accuracy", (0.6, 0.7), (0.4, 0.5), "helps"),
        ("questions", "accuracy", (0.3, 0.7), (0.4, 0.5), "within the range"),
        ("questions", "accuracy", (0.3, 0.35), (0.4, 0.5), "hurts"),
        ("sentiment", "MAE", (0.3, 0.35), (0.4, 0.5), "helps"),
        ("sentiment", "MAE", (0.6, 0.7), (0.4, 0.5), "hurts"),
        ("sentiment", "correlation", (0.6, 0.7), (0.4, 0.5), "helps"),
    ],
)
def test_a_row_says_whether_pretraining_helps(
    task: str, metric: str, with_it: tuple[float, ...], without: tuple[float, ...], said: str
) -> None:
    figure = Figure(task, f"{task} {metric}", "a task")
    runs = {
        PRETRAINED: [made(value, figure) for value in with_it],
        SCRATCH: [made(value, figure) for value in without],
        TEXT_ALONE: [made(0.2, figure)],
        PICTURE_ALONE: [PlanRun({}, 1.0, 1.0, {})],
    }
    row = _row(figure, runs)
    assert row[:3] == ["a task", "0.250", str(Spread.of(with_it))] and row[-2:] == ["-", said]


def test_the_page_names_the_result_and_the_commit() -> None:
    page = page_of(
        {
            **{"benchmark": "tasks", "settings": {"seeds": 3}, "date": "2026-01-02T03", "cpu": "a processor"},
            **{"python": "3", "torch": "2", "deepspeed": "0", "commit": "0123456789abc"},
            "tables": [{"title": "Tasks", "columns": ["task", "chance"], "rows": [["pairs", "0.5"]]}],
        }
    )
    assert "| pairs | 0.5 |" in page and "commit 0123456789." in page and "tasks-cpu.json" in page

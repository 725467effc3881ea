"""When the evaluations of a curve come, and what they leave behind."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.disk.run_folder import StageFolder
from engine.plan.plan import CurvePlan, EvaluationPlan, StagePlan
from engine.processes.seeds import generator_states
from engine.run import curve as module
from engine.run import examination
from engine.run.curve import Curve, Pace
from engine.telemetry.curve import CurvePoint, read_curve
from engine.telemetry.progress import SilentProgress
from omnivl.data.config import Decoder
from omnivl.data.tokenizer import load_tokenizer
from omnivl.tasks import RetrievalTask
from omnivl.tasks.pixel_baseline import BaselineReference
from omnivl.tasks.results import Score, TaskResult


def test_an_evaluation_comes_after_so_many_seconds_of_training() -> None:
    pace = Pace(CurvePlan(every_seconds=60, largest_share=0.05))
    pace.evaluated(1.0)
    for _ in range(59):
        pace.train(1.0)
        assert not pace.is_due(last=False)
    pace.train(1.0)
    assert pace.is_due(last=False)
    assert pace.share == pytest.approx(1 / 60)


def test_the_interval_grows_with_what_an_evaluation_costs_and_shrinks_again() -> None:
    pace = Pace(CurvePlan(every_seconds=60, largest_share=0.05))
    pace.evaluated(6.0)  # 5 % of 120 s
    assert pace.interval == pytest.approx(120)
    pace.train(119)
    assert not pace.is_due(last=False)
    pace.train(1)
    assert pace.is_due(last=False)
    pace.evaluated(2.0)
    assert pace.interval == 60


@pytest.mark.parametrize("cost", [0.1, 1.0, 3.0, 40.0])
def test_evaluations_between_steps_never_take_more_than_their_share(cost: float) -> None:
    """All but the last one are followed by so much training; an hour of steps of a second."""
    pace, evaluations = Pace(CurvePlan(every_seconds=60, largest_share=0.05)), 0
    for _ in range(3600):
        pace.train(1.0)
        if pace.is_due(last=False):
            assert pace.spent <= 0.05 * pace.trained
            pace.evaluated(cost)
            evaluations += 1
    assert evaluations == {0.1: 60, 1.0: 60, 3.0: 60, 40.0: 5}[cost]


def test_the_last_step_has_a_point_as_soon_as_the_share_allows_it() -> None:
    pace = Pace(CurvePlan(every_seconds=60, largest_share=0.05))
    pace.evaluated(1.0)
    pace.train(19)
    assert not pace.is_due(last=True)
    pace.train(1)
    assert pace.is_due(last=True)
    assert not pace.is_due(last=False)


@dataclass
class Shown(SilentProgress):
    """Keeps what it is told."""

    lines: list[str] = field(default_factory=list)
    points: list[CurvePoint] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.lines.append(text)

    def curve(self, points: Any, share: float | None) -> None:
        self.points = list(points)


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


TASK = RetrievalTask(max_samples=8, baseline=BaselineReference(max_samples=8), gallery=4)


def stage_with(plan: CurvePlan) -> StagePlan:
    return StagePlan(name="one", steps=100, data=(), objectives=(), evaluate=EvaluationPlan(curve=plan))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[bool]:
    """Evaluations of 6 s; whether each of them was asked for a baseline."""
    found: list[bool] = []

    def examine(host: Any, stage: StagePlan, tokenizer: Any, tasks: Any, decode: Decoder) -> list[TaskResult]:
        clock.now += 6.0
        (task,) = tasks
        assert task.gallery == 0, "of which nobody sees anything"
        found.append(task.baseline is not None)
        score = Score("retrieval", "image->text R@1", 0.5, 0.125, 0.25 if task.baseline else None, 8)
        return [TaskResult((score,))]

    monkeypatch.setattr(module, "examine", examine)
    return found


def start(folder: Path, step: int, plan: CurvePlan, shown: Shown) -> Curve:
    host: Any = SimpleNamespace(device=torch.device("cpu"))
    made = Curve(host, stage_with(plan), load_tokenizer("emoji"), StageFolder(folder), shown, "cpu")
    made.begin(step)
    return made


def test_the_run_says_when_the_interval_grows(tmp_path: Path, asked: list[bool]) -> None:
    shown, plan = Shown(), CurvePlan(every_seconds=60, largest_share=0.05, tasks=(TASK,))
    curve = start(tmp_path, 0, plan, shown)
    for step in (0, 30):
        curve.evaluate(step, None, f"curve-{step}")
        curve.train(120)
    assert shown.lines == [
        "stage one: the curve's evaluation took 6.0 s, more than 5% (evaluate.curve.largest_share) of 60 s of training "
        "(evaluate.curve.every_seconds); the next one comes after 2 min 00 s"
    ], "once, not after each"


def test_the_pixels_are_compared_once_in_a_start(tmp_path: Path, asked: list[bool]) -> None:
    curve = start(tmp_path, 0, CurvePlan(tasks=(TASK,)), Shown())
    for step in (0, 30, 60):
        curve.evaluate(step, None, f"curve-{step}")
    assert asked == [True, False, False]
    assert [one.pixels for one in read_curve(tmp_path / "curve.jsonl")] == [{"retrieval/image->text R@1": 0.25}] * 3


def test_a_start_keeps_the_points_up_to_its_step_and_goes_on_with_their_time(tmp_path: Path, asked: list[bool]) -> None:
    plan, shown = CurvePlan(tasks=(TASK,)), Shown()
    before = start(tmp_path, 0, plan, shown)
    for step in (0, 30, 60):
        before.evaluate(step, None, f"curve-{step}")
        before.train(90.0)
    before.close()
    lines = (tmp_path / "curve.jsonl").read_bytes().splitlines(keepends=True)
    again = start(tmp_path, 45, plan, shown)
    assert (tmp_path / "curve.jsonl").read_bytes() == b"".join(lines[:2])
    assert [one.step for one in shown.points] == [0, 30]
    assert not any(again.votes(45).values())
    again.evaluate(50, None, "curve-50")
    again.close()
    points = read_curve(tmp_path / "curve.jsonl")
    assert [(one.step, one.seconds) for one in points] == [(0, 0.0), (30, 90.0), (50, 135.0)]  # 45 steps at 3 s


def test_a_point_that_is_there_is_not_taken_twice(tmp_path: Path, asked: list[bool]) -> None:
    """A stage that is killed before its first checkpoint begins again at step 0."""
    plan = CurvePlan(tasks=(TASK,))
    curve = start(tmp_path, 0, plan, Shown())
    assert any(curve.votes(0).values())
    curve.evaluate(0, None, "curve-0")
    assert not any(curve.votes(0).values())
    assert not any(start(tmp_path, 0, plan, Shown()).votes(0).values())
    assert not start(tmp_path / "none", 0, CurvePlan(), Shown()).votes(0), "a stage without tasks has no curve"


def test_training_draws_what_it_would_have_drawn_without_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a task draws from every generator."""

    def run_tasks(tasks: Any, encoder: Any) -> list[TaskResult]:
        torch.rand(3)
        np.random.rand(3)
        return []

    monkeypatch.setattr(examination, "run_tasks", run_tasks)
    chain = nn.Linear(1, 1)
    host: Any = SimpleNamespace(device=torch.device("cpu"), whole_chain=lambda: nullcontext(chain))
    stage = replace(stage_with(CurvePlan()), steps=1)
    before = generator_states()
    assert examination.examine(host, stage, load_tokenizer("emoji"), (), "cpu") == []
    after = generator_states()
    assert before["torch"] == after["torch"]
    assert before["numpy"] == after["numpy"]
    torch.rand(1)
    assert before["torch"] != generator_states()["torch"], "the comparison can fail"


@pytest.mark.parametrize(("decode", "device"), [("cpu", None), ("gpu", "cuda:5")])
def test_evaluations_decode_where_the_plan_says(
    decode: Decoder, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str | None] = []
    monkeypatch.setattr(examination, "gpu_for_decoding", lambda start_method, num_workers: "cuda:5")
    monkeypatch.setattr(examination, "run_tasks", lambda tasks, encoder: found.append(encoder.decodes_on) or [])
    host: Any = SimpleNamespace(device=torch.device("cpu"), whole_chain=lambda: nullcontext(nn.Linear(1, 1)))
    assert examination.examine(host, stage_with(CurvePlan()), load_tokenizer("emoji"), (), decode) == []
    assert found == [device]

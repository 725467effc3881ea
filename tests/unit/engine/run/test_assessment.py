"""Which failures of an evaluation are kept, so that no later start repeats it; which checkpoint is the best."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.disk.checkpoint import SavedLayout, TrainerState
from engine.disk.evaluation import read_failed
from engine.disk.run_folder import StageFolder
from engine.plan.plan import CheckpointConfig, EvaluationPlan
from engine.plan.schema import kinds
from engine.processes import ranks
from engine.run import resumption
from engine.run.assessment import Assessment
from omnivl.tasks import (
    GQATask,
    MatchingTask,
    OptionsTask,
    RetrievalTask,
    RoutingTask,
    SentimentTask,
    TaskConfig,
)


class Failing(Assessment):
    """An evaluation that fails as one does whose neighbour is gone, or whose own data are bad."""

    def __init__(self, folder: StageFolder) -> None:
        self._folder = folder

    def _evaluate(self, *_: Any) -> float | None:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize(("lost", "kept"), [(TimeoutError, {3: "process 0: RuntimeError"}), (ConnectionError, {})])
def test_a_neighbour_that_has_ended_is_no_failed_evaluation(
    lost: type[Exception], kept: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_problem(key: str, problem: str | None, patience_seconds: float) -> str | None:
        raise lost(key)

    monkeypatch.setattr(ranks, "first_problem", first_problem)
    folder = StageFolder(tmp_path)
    with pytest.raises(RuntimeError, match="Connection reset by peer") as caught:
        Failing(folder).run(3, None, None, "evaluation-1")
    assert isinstance(caught.value.__cause__, lost)
    assert {step: text.partition(": Conn")[0] for step, text in read_failed(folder.unevaluated).items()} == kept


TASKS = (RetrievalTask(rerank=4, folds=5), OptionsTask(), SentimentTask(), RoutingTask(), GQATask(name="questions"))


def assessment_of(checkpoint: CheckpointConfig, folder: Path, own: str | None = None) -> Assessment:
    evaluate = EvaluationPlan(tasks=TASKS, keep_best=own)
    nothing, stage = cast(Any, None), cast(Any, SimpleNamespace(evaluate=evaluate))
    return Assessment(nothing, stage, nothing, StageFolder(folder), checkpoint, "cpu")


def test_a_stage_may_have_a_best_figure_of_its_own(tmp_path: Path) -> None:
    shared = CheckpointConfig(keep_best="retrieval/image->text R@1")
    assert assessment_of(shared, tmp_path).best_of == "highest retrieval/image->text R@1"
    assert assessment_of(shared, tmp_path, "options/mean rank").best_of == "lowest options/mean rank"
    assert assessment_of(CheckpointConfig(), tmp_path, "options/mean rank").best_of == "lowest options/mean rank"
    assert assessment_of(CheckpointConfig(), tmp_path).best_of is None


@pytest.mark.parametrize(
    ("figure", "best_is", "values", "kept"),
    [
        ("retrieval/image->text R@1", "auto", [0.2, 0.1, 0.3, 0.3], [0.2, 0.3]),
        ("sentiment/MAE", "auto", [1.2, 1.3, 0.9, 0.9], [1.2, 0.9]),
        ("options/mean rank", "auto", [40.0, 12.0, 20.0], [40.0, 12.0]),
        ("sentiment/correlation", "auto", [-0.1, 0.4, 0.3], [-0.1, 0.4]),
        ("routing/dropped, image", "auto", [0.2, 0.1, 0.3], [0.2, 0.1]),
        ("routing/experts used, image", "auto", [2.0, 1.0, 3.0], [2.0, 3.0]),
        ("routing/experts used, image", "lowest", [2.0, 1.0, 3.0], [2.0, 1.0]),
        ("retrieval/text->image, re-ranked, folds of 5 median rank", "auto", [4.0, 2.0, 3.0], [4.0, 2.0]),
        ("questions/distribution", "auto", [4.0, 2.0, 3.0], [4.0, 2.0]),
        ("sentiment/MAE", "highest", [1.2, 1.3, 0.9], [1.2, 1.3]),
        ("sentiment/MAE", "auto", [math.nan, 1.2, None, -math.inf, 1.1], [1.2, 1.1]),
    ],
)
def test_the_best_checkpoint_is_the_lowest_of_errors_and_ranks(
    figure: str, best_is: Any, values: list[float | None], kept: list[float], tmp_path: Path
) -> None:
    checkpoint = CheckpointConfig(keep_best=figure, best_is=best_is)
    assessment = assessment_of(checkpoint, tmp_path)
    found, best = [], None
    for value in values:
        if (better := assessment.better({figure: value, "other": 9.0}, best)) is not None:
            found.append(best := better)
    assert found == kept


def test_what_is_better_when_lower_is_a_figure_of_the_task() -> None:
    """A figure that is called otherwise one day would be taken for one of which more is better."""
    tasks = [*(cls() for cls in kinds(TaskConfig).values()), RetrievalTask(rerank=4, folds=5)]
    for task in tasks:
        for pattern in task.lower_is_better:
            assert any(fnmatchcase(figure, pattern) for figure in task.figures), (task.kind, pattern)
    assert {task.kind: {one for one in task.figures if task.prefers_lower(one)} for task in tasks} == {
        **{kind: set() for kind in kinds(TaskConfig)},
        **{"sentiment": {"MAE"}, "options": {"mean rank"}, "gqa": {"distribution"}, "routing": {"dropped, *"}},
        "matching": {one for one in MatchingTask().figures if one.endswith("rank")},
        "retrieval": {one for one in tasks[-1].figures if one.endswith("rank")},
    }
    assert len([one for one in tasks[-1].figures if tasks[-1].prefers_lower(one)]) == 8, "two ways, re-ranked, in folds"


@pytest.mark.parametrize(
    ("before", "now", "best"),
    [
        ("highest retrieval/R@1", CheckpointConfig(keep_best="retrieval/R@1"), 0.7),
        ("highest retrieval/R@1", CheckpointConfig(keep_best="sentiment/MAE"), None),
        ("highest retrieval/R@1", CheckpointConfig(keep_best="retrieval/R@1", best_is="lowest"), None),
        ("highest retrieval/R@1", CheckpointConfig(), 0.7),  # nothing is judged: what was kept stays
        (None, CheckpointConfig(keep_best="retrieval/R@1"), 0.7),  # of a version that did not write it down
    ],
)
def test_the_best_of_another_figure_is_forgotten(
    before: str | None, now: CheckpointConfig, best: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = SavedLayout("plain", None, 1, 1, 4)
    saved = TrainerState(step=4, best=0.7, best_step=2, best_of=before, layout=layout)
    position = {"position": {}, "mixture": {}}
    monkeypatch.setattr(resumption, "load_checkpoint", lambda *_: (saved, position))
    monkeypatch.setattr(resumption.LoaderState, "from_json", lambda given: given)
    assessment = assessment_of(now, tmp_path)
    found = resumption.Found(tmp_path, ())
    state = resumption.resume(found, StageFolder(tmp_path), cast(Any, None), layout, assessment, print).state
    assert (state.step, state.best, state.best_step) == (4, best, None if best is None else 2)

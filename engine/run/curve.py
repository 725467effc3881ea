"""The curve of a stage: cheap scores by time, so that one sees it learn. They change nothing that is trained."""

import time
from collections.abc import Collection, Sequence

from engine.disk.evaluation import read_failed
from engine.disk.run_folder import StageFolder
from engine.hosts.base import Host
from engine.plan.plan import CurvePlan, StagePlan
from engine.processes import ranks
from engine.run.examination import UnevaluatedError, attempt, examine
from engine.telemetry.curve import CurvePoint, read_curve
from engine.telemetry.metrics import MetricsLog, bytes_up_to
from engine.telemetry.pace import duration
from engine.telemetry.progress import Progress
from omnivl.data.config import Decoder
from omnivl.data.tokenizer import Tokenizer
from omnivl.tasks import TaskConfig
from omnivl.tasks.results import Score

_DUE = "the curve is due"


class Pace:
    """When the next evaluation comes, in seconds of training.

    Each one is followed by so much training that it stays below its share, whatever the plan's interval says.

    Attributes:
        trained: Seconds of training so far.
        spent: Seconds that evaluations took so far.
    """

    def __init__(self, plan: CurvePlan, trained: float = 0.0, spent: float = 0.0) -> None:
        """Begins an interval.

        Args:
            plan: The interval and the share that are wanted.
            trained: Seconds of training of earlier starts of the stage.
            spent: Seconds that their evaluations took.
        """
        self._plan = plan
        self.trained, self.spent = trained, spent
        self._since, self._least = 0.0, 0.0

    def train(self, seconds: float) -> None:
        """A step took so long."""
        self.trained += seconds
        self._since += seconds

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long; a new interval begins."""
        self.spent += seconds
        self._since, self._least = 0.0, seconds / self._plan.largest_share

    @property
    def interval(self) -> float:
        """Seconds of training between the last evaluation and the next."""
        return max(self._plan.every_seconds, self._least)

    def is_due(self, *, last: bool) -> bool:
        """Whether it is time; after a stage's last step as soon as the share allows it."""
        return self._since >= (self._least if last else self.interval)

    @property
    def share(self) -> float | None:
        """What evaluations took of the time of training; None before the first step."""
        return self.spent / self.trained if self.trained > 0 else None


class Curve:
    """The evaluations by time of one stage. Every method is called by every process; process 0 decides when."""

    def __init__(
        self,
        host: Host,
        stage: StagePlan,
        tokenizer: Tokenizer,
        folder: StageFolder,
        progress: Progress,
        decode: Decoder,
    ) -> None:
        """Remembers its arguments.

        Args:
            host: Holds the chain.
            stage: Says what is evaluated, and how often.
            tokenizer: Turns texts into ids.
            folder: Gets the points.
            progress: Shows them.
            decode: What decodes JPEGs and videos.
        """
        self._decode: Decoder = decode
        self._host, self._stage, self._tokenizer, self._folder = host, stage, tokenizer, folder
        self._progress, self._plan = progress, stage.evaluate.curve
        self._pace = Pace(self._plan)
        self._points: list[CurvePoint] = []
        self._reference: dict[str, float] | None = None
        self._told = self._plan.every_seconds
        self._log: MetricsLog | None = None
        self._open = bool(self._plan.tasks)

    def begin(self, step: int) -> None:
        """A start goes on after ``step``: takes over the points up to there, and removes those that come after.

        What was trained since the last of them is counted at the pace up to it.

        Raises:
            UserError: The file is damaged, or cannot be written.
        """
        if not self._open:
            return
        failed = ranks.on_first(lambda: _first_failure(self._folder), str | None)
        if failed is not None:
            self._open = False
            self._progress.message(
                f"stage {self._stage.name}: no curve any more, as its evaluation failed at {failed}; mend that, and "
                f"remove {self._folder.curve_failed} to have it again"
            )
            return
        ranks.on_first(lambda: self._take_over(step))

    def train(self, seconds: float) -> None:
        """A step took so long."""
        self._pace.train(seconds)

    def votes(self, step: int) -> dict[str, bool]:
        """Whether a point belongs after this many steps: process 0 says so."""
        return {_DUE: self._open and self._is_due_here(step)} if self._plan.tasks else {}

    def is_due(self, votes: Collection[str]) -> bool:
        """Whether a point belongs after the step in which any process gave these of ``votes``."""
        return _DUE in votes

    def evaluate(self, step: int, metrics: MetricsLog | None, key: str) -> None:
        """Adds a point.

        Args:
            step: Optimizer steps taken.
            metrics: Draws it in TensorBoard, on process 0.
            key: The same on every process, and new in this run.

        Raises:
            UnevaluatedError: The evaluation failed before the stage's last step. No later start repeats it.
        """
        tasks, began = tuple(task.without_gallery() for task in self._plan.tasks), time.perf_counter()
        if self._reference is not None:
            tasks = tuple(task.without_baseline() for task in tasks)
        try:
            scores = attempt(lambda: self._scores(tasks), key, step, self._folder.curve_failed)
        except UnevaluatedError:
            if step < self._stage.steps:
                raise
            return
        if self._reference is None:
            self._reference = _named(scores, [one.baseline for one in scores])
        cost = time.perf_counter() - began
        point = CurvePoint(
            step,
            self._pace.trained,
            cost,
            {_name(one): one.value for one in scores},
            _named(scores, [one.chance for one in scores]),
            self._reference,
            {_name(one): one.count for one in scores},
        )
        self._points.append(point)
        self._pace.evaluated(cost)
        if self._log is not None:
            self._log.write(step, "curve", **point.groups)
        if metrics is not None:
            metrics.draw(step, "curve", scores=point.scores)
        self._progress.curve(self._points, self._pace.share)
        self._tell_of_growth(cost)

    def close(self) -> None:
        """Closes the file."""
        if self._log is not None:
            self._log.close()

    def _tell_of_growth(self, cost: float) -> None:
        """Says that the interval has become longer; not again where it grows by less than a tenth."""
        interval, wanted = self._pace.interval, self._plan.every_seconds
        if interval > wanted and (self._told == wanted or interval > 1.1 * self._told):
            self._told = interval
            self._progress.message(
                f"stage {self._stage.name}: the curve's evaluation took {cost:.1f} s, more than "
                f"{self._plan.largest_share:.0%} (evaluate.curve.largest_share) of {wanted:g} s of training "
                f"(evaluate.curve.every_seconds); the next one comes after {duration(interval)}"
            )

    def _scores(self, tasks: Sequence[TaskConfig]) -> list[Score]:
        results = examine(self._host, self._stage, self._tokenizer, tasks, self._decode)
        return [score for result in results for score in result.scores]

    def _is_due_here(self, step: int) -> bool:
        if ranks.rank() != 0 or (self._points and self._points[-1].step >= step):
            return False
        return step == 0 or self._pace.is_due(last=step == self._stage.steps)

    def _take_over(self, step: int) -> None:
        file = self._folder.curve
        self._log = MetricsLog(file, None, keep_bytes=bytes_up_to(file, step))
        self._points = read_curve(file)
        if not self._points:
            return
        last, spent = self._points[-1], sum(point.cost for point in self._points)
        trained = last.seconds * (step / last.step if last.step > 0 else 1.0)
        self._pace = Pace(self._plan, trained, spent - last.cost)
        self._pace.evaluated(last.cost)
        self._progress.curve(self._points, self._pace.share)


def _name(score: Score) -> str:
    return f"{score.task}/{score.metric}"


def _named(scores: Sequence[Score], values: Sequence[float | None]) -> dict[str, float]:
    return {_name(one): value for one, value in zip(scores, values, strict=True) if value is not None}


def _first_failure(folder: StageFolder) -> str | None:
    """The step of the first failure of the curve, and why; None where none failed."""
    failed = read_failed(folder.curve_failed)
    return next((f"step {step}: {problem}" for step, problem in sorted(failed.items())), None)

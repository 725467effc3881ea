"""Evaluation within a run: during a stage and at its end. One that fails is recorded, and costs the run no step."""

import math
from collections.abc import Mapping

from engine.disk.evaluation import read_failed, write_evaluation
from engine.disk.run_folder import StageFolder
from engine.hosts.base import Host
from engine.plan.evaluation import best_of
from engine.plan.plan import CheckpointConfig, StagePlan
from engine.processes import ranks
from engine.run.examination import UnevaluatedError, attempt, examine
from engine.telemetry.metrics import MetricsLog
from omnivl.data.config import Decoder
from omnivl.data.tokenizer import Tokenizer
from omnivl.errors import UserError


class Assessment:
    """The evaluations of one stage. Every method is called by every process."""

    def __init__(
        self,
        host: Host,
        stage: StagePlan,
        tokenizer: Tokenizer,
        folder: StageFolder,
        checkpoint: CheckpointConfig,
        decode: Decoder,
    ) -> None:
        """Remembers its arguments.

        Args:
            host: Holds the chain.
            stage: Says what is evaluated, and when.
            tokenizer: Turns texts into ids.
            folder: Gets the results.
            checkpoint: Says which figure decides what is best.
            decode: What decodes JPEGs and videos.
        """
        self._decode: Decoder = decode
        self._host, self._stage, self._tokenizer, self._folder = host, stage, tokenizer, folder
        self._best = best_of(stage.evaluate, checkpoint)

    @property
    def best_of(self) -> str | None:
        """What decides which checkpoint is the best, in words; None where nothing does."""
        return None if self._best is None else str(self._best)

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after this many steps that has not failed before."""
        evaluate, last = self._stage.evaluate, step == self._stage.steps
        if not evaluate.tasks or not (last or (evaluate.every > 0 and step % evaluate.every == 0)):
            return False
        return step not in ranks.on_first(lambda: list(read_failed(self._folder.unevaluated)), list[int])

    def run(self, step: int, metrics: MetricsLog | None, best: float | None, key: str) -> float | None:
        """Evaluates. A failure is recorded, so that no later start repeats it.

        Args:
            step: Optimizer steps taken.
            metrics: The log, on process 0.
            best: The best figure so far.
            key: The same on every process, and new in this run.

        Returns:
            The figure that decides which checkpoint is the best, if it is better than ``best``. None too after a
            failure at the stage's last step.

        Raises:
            UnevaluatedError: It failed, before the stage's last step.
        """
        try:
            return attempt(lambda: self._evaluate(step, metrics, best), key, step, self._folder.unevaluated)
        except UnevaluatedError:
            if step < self._stage.steps:
                raise
            return None

    def better(self, figures: Mapping[str, float | None], best: float | None) -> float | None:
        """The figure that decides which checkpoint is the best, if it is better than ``best``; None if it is not.

        None too where it is not finite, which metrics.jsonl has as null, and where no figure decides.
        """
        if self._best is None:
            return None
        figure = best_figure(figures, self._best.figure)
        if figure is None or not math.isfinite(figure):
            return None
        is_better = best is None or (figure < best if self._best.lowest else figure > best)
        return figure if is_better else None

    def _evaluate(self, step: int, metrics: MetricsLog | None, best: float | None) -> float | None:
        results = examine(self._host, self._stage, self._tokenizer, self._stage.evaluate.tasks, self._decode)
        figures = {f"{score.task}/{score.metric}": score.value for result in results for score in result.scores}
        better = self.better(figures, best)
        if metrics is not None:
            write_evaluation(self._folder.evaluation, {"step": step}, results)
            metrics.write(step, "evaluation", scores=figures)
        return better


def best_figure(figures: Mapping[str, float | None], name: str) -> float | None:
    """The figure that decides which checkpoint is the best.

    Raises:
        UserError: There is no such figure.
    """
    if name not in figures:
        raise UserError(
            f"keep_best: got {name!r}, which is no figure of this evaluation; allowed are "
            f"{', '.join(map(repr, figures))}; name one of them, or null to keep no best checkpoint"
        )
    return figures[name]

"""Progress of a run, read from its folder without loading anything large."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from engine.disk.run_folder import RunFolder, StageFolder
from engine.plan.yaml import read_yaml
from engine.telemetry.metrics import read_metrics


@dataclass(frozen=True)
class StageProgress:
    """One stage.

    Attributes:
        name: Its name.
        steps: Optimizer steps that it has.
        saved: Steps of its newest checkpoint; all of them where it is complete.
        taken: Steps of its last line of metrics, or saved where that is more.
        seconds_per_step: From the last line of metrics; None before the first one.
        samples_per_second: Likewise.
        complete: Whether it is done.
    """

    name: str
    steps: int
    saved: int
    taken: int
    seconds_per_step: float | None
    samples_per_second: float | None
    complete: bool


def read_progress(folder: Path) -> list[StageProgress]:
    """All stages of a run; none where the run has not begun.

    Args:
        folder: The run's folder.
    """
    run = RunFolder(folder)
    if not run.plan.is_file():
        return []
    stages = read_yaml(run.plan.read_text(encoding="utf-8"), str(run.plan)).tree["stages"]
    return [_read_stage(run.stage(i, stage["name"]), stage["name"], stage["steps"]) for i, stage in enumerate(stages)]


def saved_steps(folder: Path) -> int:
    """Optimizer steps of all stages that are saved."""
    return sum(stage.saved for stage in read_progress(folder))


def seconds_left(stages: list[StageProgress]) -> float | None:
    """Seconds until all stages are done, at the speed of the last stage with a known speed; None if there is none."""
    paces = [stage.seconds_per_step for stage in stages if stage.seconds_per_step is not None]
    if not paces:
        return None
    return sum((stage.seconds_per_step or paces[-1]) * (stage.steps - stage.taken) for stage in stages)


def estimated_end(stages: list[StageProgress], now: datetime.datetime) -> datetime.datetime | None:
    """Time at which all stages will be done without interruption."""
    left = seconds_left(stages)
    return None if left is None else now + datetime.timedelta(seconds=left)


def _read_stage(folder: StageFolder, name: str, steps: int) -> StageProgress:
    complete = folder.completed_steps()
    numbers = [path.name.removeprefix("step-") for path in folder.checkpoints.glob("step-*")]
    saved = complete or max((int(number) for number in numbers if number.isdigit()), default=0)
    trained = [record for record in read_metrics(folder.metrics) if record["event"] == "train"]
    speed = trained[-1]["speed"] if trained else {}
    taken = max(saved, trained[-1]["step"] if trained else 0)
    pace, rate = speed.get("seconds_per_step"), speed.get("samples_per_second")
    return StageProgress(name, steps, saved, taken, pace, rate, complete is not None)

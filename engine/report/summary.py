"""The summary at the top of the page: how far each stage is, what it reached, and what went wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.report.curves import Record
from engine.telemetry.pace import duration
from engine.watch.failure import Failure
from omnivl.tasks.results import Score

_LEADING = 6


@dataclass(frozen=True)
class PlannedStage:
    """A stage as the plan has it; None where a plan of another version does not say it."""

    name: str
    steps: int | None


@dataclass(frozen=True)
class StageLine:
    """A line of the summary.

    Attributes:
        number: From 1.
        name: The stage's name.
        state: ``complete``, ``step 20 of 100``, ``not begun``.
        time: That its steps took, in words; "" before the first line of metrics.
        cpu_time: CPU time that they took in all processes, likewise; "" where the metrics do not have it.
        loss: The weighted total of the first and the last line; "" where there is none.
        speed: Samples a second in the last line.
        troubles: What a reader has to know, such as skipped steps.
    """

    number: int
    name: str
    state: str
    time: str
    cpu_time: str
    loss: str
    speed: str
    troubles: tuple[str, ...]


def planned_stages(plan: Any) -> list[PlannedStage]:
    """The stages of a resolved plan, given as plain containers; entries that are none are left out."""
    stages = plan.get("stages") if isinstance(plan, Mapping) else None
    entries = [one for one in stages if isinstance(one, Mapping)] if isinstance(stages, list) else []
    return [
        PlannedStage(str(one.get("name", "?")), steps if isinstance(steps := one.get("steps"), int) else None)
        for one in entries
    ]


def stage_line(number: int, planned: PlannedStage, stage: Mapping[str, Any] | None) -> StageLine:
    """The summary of one stage.

    Args:
        number: From 1.
        planned: From ``planned_stages``.
        stage: What the page shows of it; None where it was not begun.
    """
    if stage is None:
        return StageLine(number, planned.name, "not begun", "", "", "", "", ())
    records: Sequence[Record] = stage["records"]
    of = "" if planned.steps is None else f" of {planned.steps:,}"
    state = "complete" if stage["complete"] else f"step {stage['steps']:,}{of}"
    losses = [record["loss"] for record in records if "loss" in record]
    speeds = [record["speed/samples_per_second"] for record in records if "speed/samples_per_second" in record]
    return StageLine(
        number,
        planned.name,
        state,
        duration(stage_seconds(records)) if records else "",
        duration(cpu) if (cpu := stage_seconds(records, "cpu_seconds_per_step")) else "",
        f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "",
        f"{speeds[-1]:.1f}" if speeds else "",
        tuple(_troubles(stage)),
    )


def stage_seconds(records: Sequence[Record], per_step: str = "seconds_per_step") -> float:
    """Seconds that the steps of a stage took, from its lines of metrics; each has the mean since the one before."""
    seconds, before = 0.0, 0.0
    for record in records:
        seconds += (record["step"] - before) * record.get(f"speed/{per_step}", 0.0)
        before = record["step"]
    return seconds


def _troubles(stage: Mapping[str, Any]) -> list[str]:
    bad = sum(len(entries) for entries in stage["quarantine"].values())
    counts = ((stage["skipped"], "skipped step"), (len(stage["rollbacks"]), "rollback"), (bad, "bad sample"))
    return [f"{count:,} {what}{'' if count == 1 else 's'}" for count, what in counts if count]


def leading_scores(evaluation: Mapping[str, Any] | None) -> list[Score]:
    """The first score of each task of an evaluation."""
    results = [] if evaluation is None else evaluation["results"]
    return [result["scores"][0] for result in results if result["scores"]][:_LEADING]


def run_state(lines: Sequence[StageLine], failure: Failure | None) -> str:
    """The run in one sentence; ``failure`` is how its last start failed, if it did."""
    done = sum(line.state == "complete" for line in lines)
    stages = f"{len(lines)} stage{'' if len(lines) == 1 else 's'}"
    if lines and done == len(lines):
        return f"Complete: {stages}."
    said = "" if failure is None else f" The last start failed with exit code {failure.code}: {failure.said}"
    return f"Not complete: {done} of {stages} done.{said}"

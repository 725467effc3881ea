"""Whole runs of plans as a user starts them, each on its own share of the machine's cores.

Trainings take minutes, so that they cannot take turns by the step as in other benchmarks. Instead they run at the same
time in lanes: all lanes have the same number of separate cores, and other load on the machine affects all lanes
equally.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from benchmarks.record import ROOT
from engine.plan.parse import load_plan
from engine.plan.plan import Plan
from engine.telemetry.environment import usable_cores
from engine.telemetry.metrics import read_metrics
from omnivl.randomness import stable_hash
from omnivl.tasks.results import Score

Cores = frozenset[int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class PlanRun:
    """The result of one run.

    Attributes:
        scores: Scores by ``task metric`` of every stage that was evaluated, by its name and in the stages' order.
        seconds: From the start of the command to its end.
        cpu_seconds: CPU time; on a lane of one core the time that it takes without other load.
        metrics: The last training metrics of every stage, by their names in ``metrics.jsonl``.
        windows: What the steps of every stage took, line by line of its metrics.
    """

    scores: Mapping[str, Mapping[str, Score]]
    seconds: float
    cpu_seconds: float
    metrics: Mapping[str, Mapping[str, float]]
    windows: Mapping[str, Sequence["Spent"]] = field(default_factory=dict)

    @classmethod
    def together(cls, runs: Sequence[Self]) -> Self:
        """Runs of plans whose stages have different names, one after the other."""
        return cls(
            {stage: scores for one in runs for stage, scores in one.scores.items()},
            sum(one.seconds for one in runs),
            sum(one.cpu_seconds for one in runs),
            {stage: metrics for one in runs for stage, metrics in one.metrics.items()},
            {stage: windows for one in runs for stage, windows in one.windows.items()},
        )


@dataclass(frozen=True)
class Spent:
    """What steps took, without start, checkpoints and evaluations.

    Attributes:
        steps: Their number.
        cpu_seconds: CPU time of the training process.
        samples: Samples seen.
        flops: Operations of the steps, as ``omnivl.chain.flops`` counts them.
    """

    steps: int
    cpu_seconds: float
    samples: float
    flops: float

    @classmethod
    def over(cls, parts: Sequence[Self]) -> Self:
        """The sum of at least one."""
        steps, cpu_seconds, samples, flops = (sum(values) for values in zip(*map(astuple, parts), strict=True))
        return cls(steps, cpu_seconds, samples, flops)


@dataclass(frozen=True)
class Finished:
    """A command that ended well.

    Attributes:
        output: What it printed.
        seconds: From its start to its end.
        cpu_seconds: CPU time of the command and of the processes that it waited for.
    """

    output: str
    seconds: float
    cpu_seconds: float


class Lanes:
    """The usable cores cut into lanes of one size, and a queue of jobs for them.

    A job may wait for the result of one that was submitted before it, since jobs begin in order.
    """

    def __init__(self, device: torch.device, wanted: int = 2) -> None:
        """Cuts the cores.

        Args:
            device: Where models compute; a GPU is not shared, so that there it is one lane.
            wanted: Number of lanes, if there are as many cores.
        """
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_cores()))
        self.count = 1 if device.type == "cuda" else min(wanted, len(cores))
        self.cores_of_each = len(cores) // self.count
        self._free: SimpleQueue[Cores] = SimpleQueue()
        for lane in range(self.count):
            self._free.put(frozenset(cores[lane * self.cores_of_each : (lane + 1) * self.cores_of_each]))
        self._pool = ThreadPoolExecutor(self.count)

    def submit(self, job: Callable[[Cores], Result]) -> Future[Result]:
        """Calls ``job`` with a lane's cores as soon as one is free. If it fails, that is also told at once."""

        def run() -> Result:
            lane = self._free.get()
            try:
                return job(lane)
            except Exception as error:
                print(error, file=sys.stderr, flush=True)
                raise
            finally:
                self._free.put(lane)

        return self._pool.submit(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)


def run_on(cores: Cores, command: Sequence[str]) -> Finished:
    """Runs a command on some cores, from the repository's root.

    Raises:
        RuntimeError: It failed; says with what.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    pin = (lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=pin, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            told = errors.read()[-4000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{told}")
        return Finished(output.read(), time.monotonic() - start, usage.ru_utime + usage.ru_stime)


def run_plan(
    plan: Path, overrides: Sequence[str], cores: Cores, stages: Sequence[str] = (), folder: Path | None = None
) -> PlanRun:
    """Runs a plan as one process.

    Args:
        plan: The plan.
        overrides: As on the command line.
        cores: Where it runs.
        stages: Only these stages, one after the other; all where none is named.
        folder: Where the run is kept: the stages that an earlier call has finished there are not run again. None for a
            temporary folder.

    Raises:
        RuntimeError: A command failed, or ``folder`` has a run of another plan.
    """
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        run, done = Path(place) / "run", _Done(Path(place) / "done.json", load_plan(plan, overrides))
        command = [sys.executable, "-m", "launcher.cli", "pretrain", str(plan), "launch.processes=1", *overrides]
        for stage in stages or [""]:
            if stage not in done:
                choice = ["--stage", stage] if stage else []
                done.add(stage, run_on(cores, [*command, *choice, "--run-folder", str(run)]))
        written = sorted((run / "stages").glob("*/evaluation.json"))
        scores = {path.parent.name.partition("-")[2]: _scores(json.loads(path.read_text("utf-8"))) for path in written}
        logs = sorted((run / "stages").glob("*/metrics.jsonl"))
        lines = {path.parent.name.partition("-")[2]: _train_lines(path) for path in logs}
    return PlanRun(
        scores,
        *done.seconds,
        {stage: found[-1]["metrics"] for stage, found in lines.items()},
        {stage: windows_of(found) for stage, found in lines.items()},
    )


class _Done:
    """What the finished stages of a run took, kept in a file beside the run."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """Reads the file if there is one.

        Raises:
            RuntimeError: A stage in it is of another plan.
        """
        self._path, self._plan = path, plan
        self._found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for stage, one in self._found.items():
            if one["of"] != self._of(stage):
                raise RuntimeError(f"{path.parent} has a run of another plan (stage {stage or 'all'}): remove it")
        path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, stage: str) -> bool:
        return stage in self._found

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds by the clock and of the cores."""
        return sum(one["seconds"] for one in self._found.values()), sum(one["cpu"] for one in self._found.values())

    def add(self, stage: str, finished: Finished) -> None:
        """Notes what a stage took."""
        self._found[stage] = {"of": self._of(stage), "seconds": finished.seconds, "cpu": finished.cpu_seconds}
        self._path.write_text(json.dumps(self._found), "utf-8")

    def _of(self, stage: str) -> int:
        """By what a stage is known: itself, those it descends from, and what all share; all stages without a name."""
        own = [self._plan.stage(stage), *self._plan.ancestors(self._plan.stage(stage))] if stage else self._plan.stages
        return stable_hash(replace(self._plan, stages=tuple(own)).to_yaml())


def _train_lines(log: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(log) if record["event"] == "train"]


def windows_of(lines: Sequence[Mapping[str, Any]]) -> list[Spent]:
    """What the steps between two lines of metrics took: their rates times the steps."""
    found, before = [], 0
    for line in lines:
        steps, speed = line["step"] - before, line["speed"]
        seconds = steps * speed["seconds_per_step"]
        found.append(
            Spent(
                steps,
                steps * speed["cpu_seconds_per_step"],
                seconds * speed["samples_per_second"],
                seconds * speed["tflops"] * 1e12,
            )
        )
        before = line["step"]
    return found


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Score]:
    scores = [Score(**score) for result in evaluation["results"] for score in result["scores"]]
    return {f"{score.task} {score.metric}": score for score in scores}


def scaled_steps(plan: Path, share: float) -> list[str]:
    """Overrides that shorten every stage of a plan, and its warm-up, to a share of its steps."""
    overrides = []
    for stage in load_plan(plan).stages:
        steps = max(2, round(stage.steps * share))
        warmup = min(steps, max(1, round(stage.optimizer.warmup_steps * share)))
        overrides += [f"stages.{stage.name}.steps={steps}", f"stages.{stage.name}.optimizer.warmup_steps={warmup}"]
    return overrides

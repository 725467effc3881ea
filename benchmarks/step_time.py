"""Compares the training step of two checkouts, to find whether a change of the code made it slower.

python -m benchmarks.step_time ../before .                          # emoji, quickstart and limoe_tiny, first stages
python -m benchmarks.step_time ../before . --plans quickstart --all-stages --rounds 7

Whole runs take turns, in an order that is reversed from round to round, and a ratio is taken within a round. Each run
is ``omnivl pretrain`` of the checkout on its own copy of the plan, in a process and a folder of its own, shortened and
without evaluation. Seconds by the clock are those of ``metrics.jsonl``; seconds of the cores are those of all processes
of the run between two lines of it. Other load affects the former more than the latter. Steps before ``--skip`` do not
count: caches are filled and kernels chosen in them.

The engine is not imported, so that checkouts may differ in everything but the command line and the run folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.measure import Spread, over, short

PLANS = ("emoji", "quickstart", "limoe_tiny")
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, the mean over those that count.

    Attributes:
        clock: By the clock.
        cores: Of all cores together.
    """

    clock: float
    cores: float


@dataclass(frozen=True)
class Choice:
    """What to run.

    Attributes:
        steps: Of each stage.
        skip: Number of first steps that do not count.
        all_stages: Whether to run more than the plan's first stage.
        overrides: Overrides for every plan, as on the command line.
    """

    steps: int = 24
    skip: int = 6
    all_stages: bool = False
    overrides: Sequence[str] = ()


def compare(
    checkouts: Sequence[Path], plan: str, choice: Choice, rounds: int
) -> Mapping[str, tuple[list[StepTime], list[StepTime]]]:
    """Runs a plan of both checkouts in turns.

    Args:
        checkouts: Two folders; that of the code before comes first.
        plan: Name of a file in ``configs/plans``.
        choice: Which stages and steps of it.
        rounds: Number of rounds.

    Returns:
        By stage, for each checkout a figure from each round.
    """
    found: dict[str, tuple[list[StepTime], list[StepTime]]] = {}
    for number in range(rounds):
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            for stage, taken in run_steps(checkouts[place], plan, choice).items():
                found.setdefault(stage, ([], []))[place].append(taken)
    return found


def run_steps(checkout: Path, plan: str, choice: Choice) -> dict[str, StepTime]:
    """One run; returns the step time of every stage.

    Raises:
        RuntimeError: It failed; says with what.
    """
    file = checkout / "configs" / "plans" / f"{plan}.yaml"
    stages = [stage["name"] for stage in yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]]
    stages = stages if choice.all_stages else stages[:1]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "launcher.cli", "pretrain", str(file), *_overrides(stages, choice)]
        command += ["--run-folder", str(run), *([] if choice.all_stages else ["--stage", stages[0]])]
        process = subprocess.Popen(
            command, cwd=checkout, env=_environment(checkout), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            marks = _watch(process, run / "stages")
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()[-4000:]}")
        return {
            log.parent.name.partition("-")[2]: step_time(log, marks[log], choice.skip)
            for log in sorted((run / "stages").glob("*/metrics.jsonl"))
        }


def step_time(log: Path, marks: Mapping[int, float], skip: int) -> StepTime:
    """The step time of a stage that has ended.

    Args:
        log: Its ``metrics.jsonl``, a line for each step.
        marks: CPU seconds of the run, by the number of lines in the log at that time.
        skip: Steps that do not count.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    clock = [line["speed"]["seconds_per_step"] for line in lines if line["event"] == "train"][skip:]
    first, last = min(step for step in marks if step >= skip), max(marks)
    return StepTime(sum(clock) / len(clock), (marks[last] - marks[first]) / (last - first))


def table(found: Mapping[str, tuple[list[StepTime], list[StepTime]]]) -> str:
    """A line for each stage: seconds before and after, their ratio by the clock and of the cores."""
    head = f"{'stage':<28}{'seconds':>22}{'ratio by the clock':>26}{'core seconds':>22}{'ratio of the cores':>26}"
    lines = [head]
    for stage, (before, after) in found.items():
        cells = []
        for field in ("clock", "cores"):
            one, other = ([getattr(taken, field) for taken in side] for side in (before, after))
            cells.append(f"{short(Spread.of(one).median)} -> {short(Spread.of(other).median)}")
            ratio = over(other, one)
            cells.append(f"{ratio.median:.3f} ({ratio.least:.3f} to {ratio.most:.3f})")
        lines.append(f"{stage:<28}{cells[0]:>22}{cells[1]:>26}{cells[2]:>22}{cells[3]:>26}")
    return "\n".join(lines)


def imported_from(checkout: Path) -> Path:
    """The folder from which a process imports the command line if it is started as the runs are."""
    code = "import launcher, pathlib; print(pathlib.Path(launcher.__file__).resolve().parents[1])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env=_environment(checkout),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


def _overrides(stages: Sequence[str], choice: Choice) -> Iterator[str]:
    yield from ("logging.every=1", "logging.tensorboard=false", "checkpoint.every=1000000", "parallel.precision=bf16")
    for stage in stages:
        yield f"stages.{stage}.steps={choice.steps}"
        yield f"stages.{stage}.optimizer.warmup_steps=1"
        yield from (f"stages.{stage}.evaluate.tasks=[]", f"stages.{stage}.evaluate.curve.tasks=[]")
    yield from choice.overrides


def _watch(process: "subprocess.Popen[bytes]", stages: Path) -> dict[Path, dict[int, float]]:
    """Waits for the end; records the CPU seconds at each new line, by log and number of lines."""
    marks: dict[Path, dict[int, float]] = {}
    while process.poll() is None:
        for log in stages.glob("*/metrics.jsonl"):
            written, own = log.read_bytes().count(b"\n"), marks.setdefault(log, {})
            if written > max(own, default=0):
                own[written] = _core_seconds(process.pid)
        time.sleep(_POLL_SECONDS)
    return marks


def _core_seconds(pid: int) -> float:
    """CPU seconds of a process and its descendants."""
    total = 0.0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for member in family:
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _environment(checkout: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 when all runs ended well."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="checkout whose time is the ratio's denominator")
    parser.add_argument("after", type=Path, help="checkout that is compared with it")
    parser.add_argument("--plans", nargs="+", default=PLANS, help=f"of configs/plans (default: {' '.join(PLANS)})")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each checkout")
    parser.add_argument("--steps", type=int, default=Choice.steps, help="steps of each stage")
    parser.add_argument("--skip", type=int, default=Choice.skip, help="of them, that do not count")
    parser.add_argument("--all-stages", action="store_true", help="not the first stage of each plan alone")
    parser.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", help="laid over the plans")
    given = parser.parse_args(arguments)
    if not 0 <= given.skip < given.steps - 1:
        parser.error(f"--skip {given.skip} of --steps {given.steps}; allowed is less than steps - 1")
    checkouts = [given.before.resolve(), given.after.resolve()]
    for checkout in checkouts:
        if (used := imported_from(checkout)) != checkout:
            parser.error(f"{checkout}: its runs would take the code of {used}; name the folder that holds launcher/")
    choice = Choice(given.steps, given.skip, given.all_stages, given.set)
    for plan in given.plans:
        found = compare(checkouts, plan, choice, given.rounds)
        sys.stdout.write(f"{table({f'{plan} {stage}': sides for stage, sides in found.items()})}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

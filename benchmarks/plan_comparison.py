"""Stages of one plan against each other: each from new weights, for several seeds, two runs at a time.

The plan has a stage (or a chain of stages) for each way to train; they differ only in what is compared. They run as a
user would run them, each on a share of the cores. Results are the evaluation of the last stage of each and, if
requested, its last training metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import Ratio, Spread, over, short
from benchmarks.plan_runs import Cores, Lanes, PlanRun, run_plan, scaled_steps
from benchmarks.record import ROOT, Options, Report, Table

QUICK_SHARE = 0.01
FLOOR = 1e-3
"""Lower bound of scores in ratios, since a score may be 0."""


@dataclass(frozen=True)
class Comparison:
    """The definition of a comparison.

    Attributes:
        name: Name of the benchmark.
        what: Its description.
        plan: The plan.
        contenders: Stages of each by name; the last one is measured. Those that take longest come first.
        scores: Scores of the evaluation, as ``task metric``.
        leader: The contender whose score is divided by those of the others; None for no ratios.
        metrics: Training metrics of the last stage's last steps that are tabled too.
        seeds: Seeds.
        equal: What the plan gives all contenders equally much of: steps, or CPU time.
        equal_time: Whether to run all but the slowest contender again, for as many steps as the slowest one's time
            allows.
    """

    name: str
    what: str
    plan: Path
    contenders: Mapping[str, Sequence[str]]
    scores: Sequence[str]
    leader: str | None = None
    metrics: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    equal: str = "steps"
    equal_time: bool = False


def compare(comparison: Comparison, options: Options) -> Report:
    """Runs every contender with every seed, the longest first."""
    seeds, share = (comparison.seeds[:1], QUICK_SHARE) if options.quick else (comparison.seeds, 1.0)
    plan = str(comparison.plan.relative_to(ROOT))
    with Lanes(options.device) as lanes:
        runs = _run_all(comparison, lanes, dict.fromkeys(comparison.contenders, share), seeds)
        settings = {"plan": plan, "seeds": list(seeds), "at_a_time": lanes.count, "share_of_steps": share}
        tables = [_scores(comparison, runs), *([_metrics(comparison, runs)] if comparison.metrics else [])]
        tables.append(_seconds(runs, seeds))
        if comparison.equal_time:
            shares = _shares_of_equal_time(runs, share)
            slowest = {name: runs[name] for name in runs if name not in shares}
            longer = slowest | _run_all(comparison, lanes, shares, seeds)
            steps = ", ".join(f"{name} {one / share:.2f}" for name, one in shares.items())
            tables.append(_scores(comparison, longer, f"At equal time (steps: {steps} times as many)"))
            tables.append(_seconds(longer, seeds))
    return Report(comparison.name, comparison.what, _ratios(comparison, runs), tables, settings)


def _run_all(
    comparison: Comparison, lanes: Lanes, shares: Mapping[str, float], seeds: Sequence[int]
) -> dict[str, list[PlanRun]]:
    """Runs some contenders, each for its share of the plan's steps, with every seed."""
    jobs = {
        (name, seed): lanes.submit(partial(_run, comparison.plan, comparison.contenders[name], seed, share))
        for name, share in shares.items()
        for seed in seeds
    }
    return {name: [jobs[name, seed].result() for seed in seeds] for name in shares}


def _shares_of_equal_time(runs: Mapping[str, Sequence[PlanRun]], share: float) -> dict[str, float]:
    """The shares of the plan's steps for which every contender but the slowest takes as long as the slowest one.

    Time is that of the cores, so that other load on the machine does not change the numbers of steps.
    """
    taken = {name: Spread.of([run.cpu_seconds for run in found]).median for name, found in runs.items()}
    slowest = max(taken, key=lambda name: taken[name])
    return {name: share * taken[slowest] / one for name, one in taken.items() if name != slowest}


def _run(plan: Path, stages: Sequence[str], seed: int, share: float, cores: Cores) -> PlanRun:
    """Some stages of the plan, each at a share of its steps."""
    return run_plan(plan, [f"seed={seed}", *(scaled_steps(plan, share) if share != 1 else ())], cores, stages)


def _values(comparison: Comparison, runs: Mapping[str, Sequence[PlanRun]], name: str, score: str) -> list[float]:
    last = comparison.contenders[name][-1]
    return [run.scores[last][score].value for run in runs[name]]


def _scores(comparison: Comparison, runs: Mapping[str, Sequence[PlanRun]], title: str = "") -> Table:
    """Median and range over the seeds."""
    title = title or f"At equal {comparison.equal}"
    rows = []
    first = next(iter(runs))
    for score in comparison.scores:
        chance = runs[first][0].scores[comparison.contenders[first][-1]][score].chance
        spreads = (str(Spread.of(_values(comparison, runs, name, score))) for name in runs)
        rows.append([score, *spreads, short(chance or 0.0)])
    return Table(f"{title}: median over the seeds (least to most)", ("metric", *runs, "chance"), rows)


def _seconds(runs: Mapping[str, Sequence[PlanRun]], seeds: Sequence[int]) -> Table:
    rows = [
        [str(seed), *(f"{runs[name][place].seconds:.0f} / {runs[name][place].cpu_seconds:.0f}" for name in runs)]
        for place, seed in enumerate(seeds)
    ]
    return Table("Seconds by the clock / of the cores", ("seed", *runs), rows)


def _metrics(comparison: Comparison, runs: Mapping[str, Sequence[PlanRun]]) -> Table:
    rows = []
    for metric in comparison.metrics:
        cells = []
        for name, found in runs.items():
            last = comparison.contenders[name][-1]
            values = [run.metrics[last][metric] for run in found if metric in run.metrics[last]]
            cells.append(str(Spread.of(values)) if values else "-")
        rows.append([metric, *cells])
    return Table("Training metrics at the end", ("metric", *runs), rows)


def _ratios(comparison: Comparison, runs: Mapping[str, Sequence[PlanRun]]) -> list[Ratio]:
    leader = comparison.leader
    if leader is None:
        return []
    return [
        Ratio(
            f"{score}: {leader} / {rival}",
            over(
                _values(comparison, runs, leader, score),
                [max(value, FLOOR) for value in _values(comparison, runs, rival, score)],
            ),
        )
        for score in comparison.scores
        for rival in runs
        if rival != leader
    ]

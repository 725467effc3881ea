"""Stages of one plan against each other: each from new weights, for several seeds, two runs at a time.

A plan that compares ways to train holds them as stages (or chains of stages) that differ in what is compared and in
nothing else. They run as a user would run them, each on a share of the cores; what is compared is how the last stage of
each was evaluated, and the last training metrics where those are asked for.
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
"""Least score in ratios: a contender may find nothing."""


@dataclass(frozen=True)
class Comparison:
    """What is set against what.

    Attributes:
        name: Of the benchmark.
        what: Its description.
        plan: The plan.
        contenders: Stages of each by name; the last one is measured. Those that take longest come first.
        scores: Scores of the evaluation, as ``task metric``.
        leader: The contender over whose rivals ratios are taken; None for no ratios.
        metrics: Training metrics of the last stage's last steps that are tabled too.
        seeds: Seeds.
    """

    name: str
    what: str
    plan: Path
    contenders: Mapping[str, Sequence[str]]
    scores: Sequence[str]
    leader: str | None = None
    metrics: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)


def compare(comparison: Comparison, options: Options) -> Report:
    """Runs every contender with every seed, the longest first."""
    seeds, share = (comparison.seeds[:1], QUICK_SHARE) if options.quick else (comparison.seeds, 1.0)
    with Lanes(options.device) as lanes:
        jobs = {
            (name, seed): lanes.submit(partial(_run, comparison.plan, stages, seed, share))
            for name, stages in comparison.contenders.items()
            for seed in seeds
        }
    runs = {name: [jobs[name, seed].result() for seed in seeds] for name in comparison.contenders}
    plan = str(comparison.plan.relative_to(ROOT))
    settings = {"plan": plan, "seeds": list(seeds), "at_a_time": lanes.count, "share_of_steps": share}
    tables = [_scores(comparison, runs), *([_metrics(comparison, runs)] if comparison.metrics else [])]
    seconds = [[str(seed), *(f"{runs[name][place].seconds:.0f}" for name in runs)] for place, seed in enumerate(seeds)]
    tables.append(Table("Seconds", ("seed", *runs), seconds))
    return Report(comparison.name, comparison.what, _ratios(comparison, runs), tables, settings)


def _run(plan: Path, stages: Sequence[str], seed: int, share: float, cores: Cores) -> PlanRun:
    """Some stages of the plan, each at a share of its steps."""
    return run_plan(plan, [f"seed={seed}", *(scaled_steps(plan, share) if share < 1 else ())], cores, stages)


def _values(comparison: Comparison, runs: Mapping[str, Sequence[PlanRun]], name: str, score: str) -> list[float]:
    last = comparison.contenders[name][-1]
    return [run.scores[last][score].value for run in runs[name]]


def _scores(comparison: Comparison, runs: Mapping[str, Sequence[PlanRun]]) -> Table:
    rows = []
    first = next(iter(runs))
    for score in comparison.scores:
        chance = runs[first][0].scores[comparison.contenders[first][-1]][score].chance
        spreads = (str(Spread.of(_values(comparison, runs, name, score))) for name in runs)
        rows.append([score, *spreads, short(chance or 0.0)])
    return Table("Median over the seeds (least to most)", ("metric", *runs, "chance"), rows)


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

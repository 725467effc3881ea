"""The paper's claim in small: decoupled training against images only, videos only, and both from the start.

``configs/plans/regimes.yaml`` holds all four as stages, at equal steps and batch size. Its stages run as a user would
run them, for three seeds, two runs at a time, each on half of the cores. What is compared is image retrieval, clip
retrieval and motion recognition at the end of each of the four.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.measure import Ratio, Spread, over, short
from benchmarks.plan_runs import Cores, Lanes, PlanRun, run_plan, scaled_steps
from benchmarks.record import ROOT, Options, Report, Table, main_of

PLAN = ROOT / "configs" / "plans" / "regimes.yaml"
SEEDS = (0, 1, 2)
QUICK_SHARE = 0.01
REGIMES: Mapping[str, Sequence[str]] = {
    "videos only": ("videos_only",),
    "decoupled": ("spatial", "temporal", "joint"),
    "both": ("both_only",),
    "images only": ("images_only",),
}
"""The stages of each; the last one is measured. Those that take longest come first."""

METRICS = (
    "images image->text R@1",
    "images image->text R@10",
    "images text->image R@10",
    "clips video->text R@1",
    "clips video->text R@10",
    "clips text->video R@10",
    "motion accuracy, 12 classes",
)
FLOOR = 1e-3
"""Least score in ratios: a regime may find nothing."""


def run_regime(stages: Sequence[str], seed: int, share: float, cores: Cores) -> PlanRun:
    """Some stages of the plan, each at a share of its steps."""
    return run_plan(PLAN, [f"seed={seed}", *(scaled_steps(PLAN, share) if share < 1 else ())], cores, stages)


def run(options: Options) -> Report:
    """Runs every regime of every seed in a lane, the longest first."""
    seeds, share = (SEEDS[:1], QUICK_SHARE) if options.quick else (SEEDS, 1.0)
    with Lanes(options.device) as lanes:
        runs = {
            (regime, seed): lanes.submit(partial(run_regime, stages, seed, share))
            for regime, stages in REGIMES.items()
            for seed in seeds
        }
    scores = {
        regime: [runs[regime, seed].result().scores[stages[-1]] for seed in seeds] for regime, stages in REGIMES.items()
    }
    values = {
        (regime, metric): [one[metric].value for one in scores[regime]] for regime in REGIMES for metric in METRICS
    }
    chance = {metric: scores["decoupled"][0][metric].chance for metric in METRICS}
    rows = [
        [metric, *(str(Spread.of(values[regime, metric])) for regime in REGIMES), short(chance[metric] or 0.0)]
        for metric in METRICS
    ]
    ratios = [
        Ratio(
            f"{metric}: decoupled / {regime}",
            over(values["decoupled", metric], [max(value, FLOOR) for value in values[regime, metric]]),
        )
        for metric in METRICS
        for regime in REGIMES
        if regime != "decoupled"
    ]
    seconds = [[str(seed), *(f"{runs[regime, seed].result().seconds:.0f}" for regime in REGIMES)] for seed in seeds]
    return Report(
        "regimes",
        " ".join((__doc__ or "").split()),
        ratios,
        [
            Table("Median over the seeds (least to most)", ("metric", *REGIMES, "chance"), rows),
            Table("Seconds", ("seed", *REGIMES), seconds),
        ],
        {"plan": str(PLAN.relative_to(ROOT)), "seeds": list(seeds), "at_a_time": lanes.count},
    )


if __name__ == "__main__":
    main_of("regimes", __doc__, run)

"""The paper's claim on a small scale: decoupled training against joint training from scratch and one-directional one.

``configs/plans/regimes.yaml`` holds all three as stages whose steps take about the same CPU time; the table of seconds
says how nearly. They run as a user would run them, for three seeds, two runs at a time, each on half of the cores.
Scores are image retrieval, clip retrieval and motion recognition at the end of each.
"""

from benchmarks.plan_comparison import Comparison, compare
from benchmarks.record import ROOT, Options, Report, main_of

COMPARISON = Comparison(
    name="regimes",
    what=" ".join((__doc__ or "").split()),
    plan=ROOT / "configs" / "plans" / "regimes.yaml",
    contenders={
        "decoupled": ("spatial", "temporal", "joint"),
        "joint from scratch": ("from_scratch",),
        "one-directional": ("spatial", "one_way"),
    },
    scores=(
        "images image->text R@1",
        "images image->text R@10",
        "images text->image R@10",
        "clips video->text R@1",
        "clips video->text R@10",
        "clips text->video R@10",
        "motion accuracy, 12 classes",
    ),
    leader="decoupled",
    equal="CPU time",
)


def run(options: Options) -> Report:
    """Runs every regime with every seed."""
    return compare(COMPARISON, options)


if __name__ == "__main__":
    main_of("regimes", __doc__, run)

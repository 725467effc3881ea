"""The paper's claim on a small scale: decoupled training against images only, videos only, and both from the start.

``configs/plans/regimes.yaml`` holds all four as stages, at equal steps and batch size. Its stages run as a user would
run them, for three seeds, two runs at a time, each on half of the cores. Scores are image retrieval, clip retrieval and
motion recognition at the end of each of the four.
"""

from benchmarks.plan_comparison import Comparison, compare
from benchmarks.record import ROOT, Options, Report, main_of

COMPARISON = Comparison(
    name="regimes",
    what=" ".join((__doc__ or "").split()),
    plan=ROOT / "configs" / "plans" / "regimes.yaml",
    contenders={
        "videos only": ("videos_only",),
        "decoupled": ("spatial", "temporal", "joint"),
        "both": ("both_only",),
        "images only": ("images_only",),
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
)


def run(options: Options) -> Report:
    """Runs every regime with every seed."""
    return compare(COMPARISON, options)


if __name__ == "__main__":
    main_of("regimes", __doc__, run)

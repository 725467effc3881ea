"""LIMoE against dense layers at equal active operations, where the model learns to tell all names of the drawings.

``configs/plans/sparse.yaml`` trains the same towers with dense layers, with experts in the last block and in every
second one, three seeds: first all for the same number of steps, then all for as long as the slowest one took, since
sparse experts take longer for the same operations. Scores are retrieval of an unseen style.
"""

from benchmarks.plan_comparison import Comparison, compare
from benchmarks.record import ROOT, Options, Report, main_of

COMPARISON = Comparison(
    name="sparse",
    what=" ".join((__doc__ or "").split()),
    plan=ROOT / "configs" / "plans" / "sparse.yaml",
    contenders={"every second": ("every_second",), "last": ("last",), "dense": ("dense",)},
    scores=("images image->text R@1", "images image->text R@10", "images text->image R@10"),
    metrics=("router/experts_used_image", "classify/accuracy"),
    equal_time=True,
)


def run(options: Options) -> Report:
    """Runs every layer with every seed."""
    return compare(COMPARISON, options)


if __name__ == "__main__":
    main_of("sparse", __doc__, run)

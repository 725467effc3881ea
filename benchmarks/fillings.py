"""Compares fillings of the feed-forward slot at equal active operations: dense, by modality, sparse, and both.

``configs/plans/fillings.yaml`` trains one transformer for images, clips and texts with each filling, three seeds: first
all for the same number of steps, then all for as long as the slowest one took, since sparse experts take longer for the
same operations. Scores are retrieval of unseen drawings and clips.
"""

from benchmarks.plan_comparison import Comparison, compare
from benchmarks.record import ROOT, Options, Report, main_of

COMPARISON = Comparison(
    name="fillings",
    what=" ".join((__doc__ or "").split()),
    plan=ROOT / "configs" / "plans" / "fillings.yaml",
    contenders={
        "limoe": ("limoe",),
        "mome_limoe": ("mome_limoe",),
        "mome": ("mome",),
        "dense": ("dense",),
    },
    scores=(
        "images image->text R@1",
        "images image->text R@10",
        "images text->image R@10",
        "clips video->text R@1",
        "clips text->video R@10",
    ),
    metrics=("router/experts_used_image", "router/experts_used_text", "univlc/visual_to_text_r1"),
    equal_time=True,
)


def run(options: Options) -> Report:
    """Runs every filling with every seed."""
    return compare(COMPARISON, options)


if __name__ == "__main__":
    main_of("fillings", __doc__, run)

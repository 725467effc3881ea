"""Effects of the auxiliary losses of sparse experts: a small grid, three seeds.

``configs/plans/router_losses.yaml`` trains one transformer for images and texts with sparse experts in every second
block, with none of the losses, with importance, load and z, with local entropy added for texts, with global entropy
added for both modalities, and with all. Results are retrieval on the unseen style, and the number of experts that each
modality uses at the end.
"""

from benchmarks.plan_comparison import Comparison, compare
from benchmarks.record import ROOT, Options, Report, main_of

COMPARISON = Comparison(
    name="router_losses",
    what=" ".join((__doc__ or "").split()),
    plan=ROOT / "configs" / "plans" / "router_losses.yaml",
    contenders={
        "none": ("none",),
        "importance, load, z": ("balance",),
        "+ local": ("local",),
        "+ global": ("global",),
        "all": ("all",),
    },
    scores=("unseen style image->text R@1", "unseen style image->text R@10", "unseen style text->image R@10"),
    metrics=tuple(
        f"router/{figure}_{modality}"
        for figure in ("experts_used", "confidence", "entropy")
        for modality in ("image", "text")
    ),
)


def run(options: Options) -> Report:
    """Runs every set of losses with every seed."""
    return compare(COMPARISON, options)


if __name__ == "__main__":
    main_of("router_losses", __doc__, run)

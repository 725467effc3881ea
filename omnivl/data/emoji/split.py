"""Splits concepts about 80/10/10, stratified by subgroup, with whole families.

A family (gender variants, skin tones) never spans two splits. Subgroups too small for a test of a few examples stay in
``train``. The order within a subgroup is that of a hash, so that a new concept in one subgroup does not change the
splits of another.
"""

from collections import defaultdict
from collections.abc import Sequence

from omnivl.data.emoji.join import Concept
from omnivl.randomness import stable_hash

SPLITS = ("train", "val", "test")
HELD_OUT = ("test", "val")
SHARE = 0.1
SMALLEST_SUBGROUP = 8


def split_families(concepts: Sequence[Concept]) -> dict[str, str]:
    """Assigns each family to a split.

    Args:
        concepts: Concepts without skin tones.

    Returns:
        Split by family key.
    """
    subgroups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    home: dict[str, str] = {}
    for concept in concepts:  # a family in two subgroups counts in the first one
        subgroup = home.setdefault(concept.family, concept.subgroup)
        subgroups[subgroup][concept.family] += 1
    splits: dict[str, str] = {}
    for sizes in subgroups.values():
        splits.update(_split_subgroup(sizes))
    return splits


def _split_subgroup(sizes: dict[str, int]) -> dict[str, str]:
    """Fills test, then val, with families in hash order up to a tenth of the subgroup; the rest is train."""
    total = sum(sizes.values())
    splits = dict.fromkeys(sizes, "train")
    if total < SMALLEST_SUBGROUP:
        return splits
    waiting = sorted(sizes, key=lambda family: stable_hash("emoji", "split", family))
    quota = max(1, round(SHARE * total))
    for split in HELD_OUT:
        taken = 0
        for family in list(waiting):
            if taken + sizes[family] <= quota:
                splits[family] = split
                taken += sizes[family]
                waiting.remove(family)
        if taken == 0 and len(waiting) > 2:  # every family is larger than the quota
            smallest = min(waiting, key=lambda family: sizes[family])
            splits[smallest] = split
            waiting.remove(smallest)
    return splits

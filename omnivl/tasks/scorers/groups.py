"""Means by group: by type of question, category of phrase, domain."""

from collections import defaultdict
from collections.abc import Sequence


def by_group(groups: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """The mean of the values of each group, groups in alphabetical order."""
    found: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        found[group].append(value)
    return {group: sum(own) / len(own) for group, own in sorted(found.items())}

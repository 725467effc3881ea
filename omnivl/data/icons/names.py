"""What the name of an icon says: words, concept, and what is held out.

Two keys come from a name. ``identity`` is the concept: the words without those that say how it is drawn, as the set
declares them. ``family`` also drops numbers, skin tones and all usual words of style, and the order of the rest: it
joins too much rather than too little, so that no form of a name that is held out is trained on.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omnivl.randomness import stable_hash

SPLITS = ("train", "val", "test")
HELD_OUT_NAMES = {"test": 0.05, "val": 0.05}
"""Share of the families in each split."""

_SKIN_TONE = re.compile(r"-(?:medium-)?(?:light|medium|dark)-skin-tone\b")
_DRAWN_AS = frozenset({"outline", "outlined", "fill", "filled", "solid", "duotone", "twotone", "linear"})
_STYLE_WORDS = _DRAWN_AS | {
    "alt", "background", "baseline", "black", "bold", "broken", "circle", "color", "colored",
    "colour", "dark", "default", "duo", "flat", "inverse", "large", "light", "line", "logo",
    "medium", "micro", "mini", "pixel", "regular", "remix", "reverse", "round", "rounded", "sharp",
    "small", "square", "thick", "thin", "tone", "two", "variant", "white", "wordmark",
}  # fmt: skip
_RANGE = 2**63


def words_of(name: str) -> str:
    """``arrow-left`` as a text."""
    return " ".join(part for part in name.split("-") if part)


class Themes:
    """The parts of a set's names that say how an icon is drawn: ``outline``, ``20-filled`` ..."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        """Reads ``prefixes`` and ``suffixes`` of a set's JSON."""
        self._prefixes = _longest_first(tree.get("prefixes"))
        self._suffixes = _longest_first(tree.get("suffixes"))

    def identity(self, name: str) -> str:
        """The concept of a name; the whole name if nothing else would remain."""
        name = _SKIN_TONE.sub("", name)
        core = name
        for suffix in self._suffixes:
            if core.endswith(f"-{suffix}"):
                core = core.removesuffix(f"-{suffix}")
                break
        for prefix in self._prefixes:
            if core.startswith(f"{prefix}-"):
                core = core.removeprefix(f"{prefix}-")
                break
        parts = core.split("-")
        while len(parts) > 1 and parts[-1] in _DRAWN_AS:
            parts.pop()
        return "-".join(parts)

    def family(self, name: str) -> str:
        """The key that is in one split."""
        return family_of(self.identity(name))


def family_of(identity: str) -> str:
    """The key of a concept that is in one split: its words of content in the order of the alphabet."""
    parts = [part for part in _SKIN_TONE.sub("", identity).split("-") if part]
    content = [part for part in parts if part not in _STYLE_WORDS and not re.fullmatch(r"\d+(?:px|x\d+)?", part)]
    return "-".join(sorted(content or parts))


def split_of(family: str, held_out: Mapping[str, str]) -> str:
    """The split of a family.

    Args:
        family: Of ``family_of``.
        held_out: Families whose split is given: those that the embedded drawings hold out.
    """
    if family in held_out:
        return held_out[family]
    place = stable_hash("icons", "split", family) / _RANGE
    for split, share in HELD_OUT_NAMES.items():
        if place < share:
            return split
        place -= share
    return "train"


def share_of(prefix: str, name: str) -> float:
    """A number in [0, 1): icons below 0.01 are a hundredth of all, and lie among those below 0.1."""
    return round(stable_hash("icons", "share", prefix, name) / _RANGE, 9)


def captions_of(name: str, further: Sequence[str], categories: Sequence[str], title: str) -> list[str]:
    """The texts of an icon: its name; with its further names and categories; with the name of its set."""
    said = words_of(name)
    texts = [said, ", ".join([said, *map(words_of, further), *categories]), f"{said}, {title}"]
    return list(dict.fromkeys(texts))


def held_out_names(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Families that are held out because other drawings of them are.

    Args:
        named: Names in words and their splits. Where two names are of one family, ``test`` goes before ``val``.
    """
    found: dict[str, str] = {}
    for name, split in named:
        family = family_of(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
        if split != "train" and found.get(family) != "test":
            found[family] = split
    return found


def _longest_first(declared: object) -> list[str]:
    """The parts that are declared; the empty one means the icons that have none."""
    names = [name for name in declared if isinstance(name, str) and name] if isinstance(declared, dict) else []
    return sorted(names, key=lambda name: (-len(name), name))

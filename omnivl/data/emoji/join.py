"""Concepts by code points: the names, tags and groups of emojibase, joined with the drawings of three styles."""

import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnivl.data.emoji.packages import DRAWINGS
from omnivl.errors import DataError

FLAG_GROUP = "flags"
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_VARIATION_SELECTOR = "fe0f"
_JOINER = "200d"
_NEUTRAL = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2", "1f474": "1f9d3", "1f475": "1f9d3"}
_SIGNS = frozenset({"2640", "2642", *SKIN_TONES})
_COUPLE = "1f9d1-200d-1f91d-200d-1f9d1"
_FAMILIES = {
    "1f46b": _COUPLE,  # woman and man holding hands
    "1f46c": _COUPLE,
    "1f46d": _COUPLE,
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
    "1f934": "1fac5",  # prince, princess: person with crown
    "1f478": "1fac5",
    "1f930": "1fac4",  # pregnant woman, man, person
    "1fac3": "1fac4",
    "1f931": "1f9d1-200d-1f37c",  # feeding a baby
    "1f483": "1f57a",  # woman, man dancing
    "1f936": "1f385",  # Mrs. Claus, Mx Claus, Santa Claus
    "1f9d1-200d-1f384": "1f385",
    "1f46a": "1f9d1-200d-1f9d1-200d-1f9d2",  # family
    "1f6b9": "1f6bb",  # men's room, women's room, restroom
    "1f6ba": "1f6bb",
    "1f9d4": "1f9d4",
}


@dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
        hexcode: Code points in lower-case hex, joined by ``-``, without variation selectors and leading zeros.
        name: English name, unique.
        tags: English keywords.
        group: English name of the group, e.g. ``animals & nature``.
        subgroup: English name of the subgroup, e.g. ``mammals``.
        identity: Hexcode without skin tone: what the drawings of one concept share.
        family: Key shared by the gender variants and skin tones of a concept, which are all in one split.
    """

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    identity: str
    family: str


def normalise(code_points: str) -> str:
    """``1F9D4-200D-2642-FE0F`` or a file's stem to a hexcode that all packages share."""
    return "-".join(part.lstrip("0") for part in code_points.lower().split("-") if part and part != _VARIATION_SELECTOR)


def family_of(hexcode: str) -> str:
    """Key that gender variants and skin tones have in common: neutral persons, no gender sign, no tone."""
    parts = [_NEUTRAL.get(part, part) for part in hexcode.split("-") if part not in _SIGNS]
    while parts and parts[-1] == _JOINER:
        parts.pop()
    key = "-".join(parts)
    return _FAMILIES.get(key, key)


def has_skin_tone(hexcode: str) -> bool:
    """Whether the code points contain one of the five skin tones."""
    return not SKIN_TONES.isdisjoint(hexcode.split("-"))


def read_concepts(emojibase: Path, skin_tones: bool = False) -> list[Concept]:
    """Reads all emoji that belong to a subgroup, in emojibase's order.

    Args:
        emojibase: The package's archive.
        skin_tones: Also list each skin tone as an entry of its own.

    Raises:
        DataError: The archive misses a member.
    """
    messages = read_json(emojibase, "package/en/messages.json")
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    concepts = []
    entries = [entry for entry in read_json(emojibase, "package/en/data.json") if "subgroup" in entry]
    for entry in sorted(entries, key=lambda entry: (entry["order"], entry["hexcode"])):
        identity = normalise(entry["hexcode"])
        for form in (entry, *(entry.get("skins", ()) if skin_tones else ())):
            hexcode = normalise(form["hexcode"])
            concepts.append(
                Concept(
                    hexcode=hexcode,
                    name=form["label"],
                    tags=tuple(entry.get("tags", ())),
                    group=groups[entry["group"]],
                    subgroup=subgroups[entry["subgroup"]],
                    identity=identity,
                    family=family_of(identity),
                )
            )
    return concepts


def read_names(emojibase: Path, language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name and tags by hexcode in one of emojibase's languages, skin tones included.

    Raises:
        DataError: The archive misses the language.
    """
    names = {}
    for entry in read_json(emojibase, f"package/{language}/data.json"):
        tags = tuple(entry.get("tags", ()))
        for form in (entry, *entry.get("skins", ())):
            names[normalise(form["hexcode"])] = (str(form["label"]), tags)
    return names


def languages(emojibase: Path) -> tuple[str, ...]:
    """Languages that the archive has names in, sorted."""
    with tarfile.open(emojibase) as archive:
        parts = [name.split("/") for name in archive.getnames() if name.endswith("/data.json")]
    return tuple(sorted(part[1] for part in parts if len(part) == 3))


def read_drawings(packages: Mapping[str, Path], style: str) -> dict[str, bytes]:
    """Encoded drawings of one style by hexcode."""
    drawing = DRAWINGS[style]
    return dict(iterate_members(packages[drawing.package], drawing.folder, drawing.suffix))


def iterate_members(
    archive_path: Path, folder: str, suffix: str, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yields (hexcode, bytes) of an archive's files in the archive's order.

    Args:
        archive_path: An npm archive.
        folder: Folder inside it, with a slash at the end.
        suffix: How the file names end.
        wanted: Hexcodes to take; None for all.
    """
    with tarfile.open(archive_path, "r|gz") as archive:  # one pass; some archives have 200 MB
        for member in archive:
            if not (member.name.startswith(folder) and member.name.endswith(suffix)):
                continue
            hexcode = normalise(member.name[len(folder) : -len(suffix)])
            file = archive.extractfile(member) if wanted is None or hexcode in wanted else None
            if file is not None:
                yield hexcode, file.read()


def core_concepts(concepts: list[Concept], drawings: Mapping[str, Collection[str]]) -> list[Concept]:
    """The concepts without flags and skin tones that are drawn in every style."""
    return [
        concept
        for concept in concepts
        if concept.group != FLAG_GROUP
        and concept.hexcode == concept.identity
        and all(concept.hexcode in hexcodes for hexcodes in drawings.values())
    ]


def read_json(archive_path: Path, member: str) -> Any:
    """Parses a JSON file inside an npm archive.

    Raises:
        DataError: There is no such member.
    """
    with tarfile.open(archive_path) as archive:
        try:
            file = archive.extractfile(member)
        except KeyError:
            file = None
        if file is None:
            raise DataError(f"{archive_path}: no {member}; fetch the archive again with 'omnivl data build emoji'")
        return json.load(file)

"""Icon sets that draw emoji, each an npm package of its own: drawings of concepts, with one licence for the set."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.emoji.iconify import read_contents, svg_of
from omnivl.data.emoji.join import Concept, normalise, read_json
from omnivl.errors import DataError


@dataclass(frozen=True)
class IconSet:
    """One set.

    Attributes:
        title: Its name in words.
        license: SPDX identifier.
        icons: Drawings by name, also by further names; those that turn or mirror another one are left out.
        characters: Names by hexcode, for sets that say which emoji they draw.
    """

    title: str
    license: str
    icons: Mapping[str, bytes]
    characters: Mapping[str, str]

    def drawings(self, concepts: Iterable[Concept]) -> dict[str, bytes]:
        """The SVG of each concept that the set draws, by hexcode: joined by code points, else by the name."""
        found = {}
        for concept in concepts:
            for name in (self.characters.get(concept.hexcode), slug(concept.name)):
                if name is not None and name in self.icons:
                    found[concept.hexcode] = self.icons[name]
                    break
        return found


def slug(name: str) -> str:
    """``face with tears of joy`` as icon sets write it: ``face-with-tears-of-joy``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_icons(archive: Path) -> IconSet:
    """Reads a set from its npm archive.

    Raises:
        DataError: The archive has no icons, or no licence.
    """
    tree = read_json(archive, "package/icons.json")
    info = read_json(archive, "package/info.json")
    characters = read_json(archive, "package/chars.json")
    license_id = info.get("license", {}).get("spdx")
    if not license_id:
        raise DataError(f"{archive}: package/info.json states no licence; a set without one is not used")
    contents = read_contents(tree)
    icons = {name: svg_of(icon) for name, icon in contents.icons.items() if icon.upright}
    icons |= {name: icons[owner] for name, owner in contents.aliases.items() if owner in icons}
    known = {normalise(code): name for code, name in characters.items()}
    return IconSet(str(info["name"]), str(license_id), icons, known)

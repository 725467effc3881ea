"""Icon sets as Iconify packages them: SVG bodies by name, with one licence for the set.

Source: the format IconifyJSON: ``icons``, ``aliases`` with a ``parent`` and turns, sizes of the set or of an icon.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnivl.data.emoji.join import Concept, normalise, read_json
from omnivl.errors import DataError

_SIDE = 16
"""Width and height where neither the set nor the icon has one."""


@dataclass(frozen=True)
class IconSet:
    """One set.

    Attributes:
        title: Its name in words.
        license: SPDX identifier.
        icons: Drawings by name; aliases that only rename one are among them.
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
    icons = {name: svg_of(icon, tree) for name, icon in tree["icons"].items()}
    for name, alias in tree.get("aliases", {}).items():
        if set(alias) <= {"parent", "hidden"} and alias["parent"] in icons:
            icons.setdefault(name, icons[alias["parent"]])
    known = {normalise(code): name for code, name in characters.items()}
    return IconSet(str(info["name"]), str(license_id), icons, known)


def svg_of(icon: Mapping[str, Any], of_set: Mapping[str, Any]) -> bytes:
    """A whole SVG from an icon's body.

    Args:
        icon: ``body``, and what differs from the set: ``left``, ``top``, ``width``, ``height``.
        of_set: Sizes of the set.
    """
    size = {side: icon.get(side, of_set.get(side, _SIDE)) for side in ("width", "height")}
    corner = {side: icon.get(side, of_set.get(side, 0)) for side in ("left", "top")}
    box = f"{corner['left']} {corner['top']} {size['width']} {size['height']}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'.encode()

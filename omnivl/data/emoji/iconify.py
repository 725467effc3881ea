"""Icon sets as Iconify writes them: one JSON file of SVG bodies by name, with sizes, aliases and turns.

Source: the types IconifyJSON, IconifyIcon and IconifyAlias of Iconify's documentation.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEFAULTS = {"left": 0, "top": 0, "width": 16, "height": 16}
"""The view box where neither the set nor the icon says otherwise."""
_OVERRIDDEN = (*_DEFAULTS, "hidden")
_MIRRORS = ("hFlip", "vFlip")
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class Icon:
    """One drawing.

    Attributes:
        body: What stands inside ``<svg>``.
        left: Left edge of the view box, in units of the drawing, as the next three.
        top: Upper edge.
        width: Width, above 0.
        height: Height, above 0.
        rotate: Quarter turns clockwise, 0 to 3, after the mirroring.
        h_flip: Left and right are exchanged.
        v_flip: Top and bottom are exchanged.
        hidden: The set keeps it for old pages only and does not list it.
    """

    body: str
    left: float = 0
    top: float = 0
    width: float = 16
    height: float = 16
    rotate: int = 0
    h_flip: bool = False
    v_flip: bool = False
    hidden: bool = False

    @property
    def upright(self) -> bool:
        """Whether the body is shown as it stands."""
        return not (self.rotate or self.h_flip or self.v_flip)


@dataclass(frozen=True)
class Contents:
    """What a set holds. Each name is in exactly one of the three.

    Attributes:
        icons: Drawings by name: the set's icons, and aliases that turn, mirror or cut another one.
        aliases: Further names of a drawing: alias to the name in ``icons``.
        damaged: Why a name has no drawing.
    """

    icons: Mapping[str, Icon]
    aliases: Mapping[str, str]
    damaged: Mapping[str, str]


class _DamagedError(Exception):
    """An entry that the format does not allow."""


def read_contents(tree: Mapping[str, Any]) -> Contents:
    """Resolves the aliases, turns and sizes of a set. What is wrong in one entry harms no other.

    Args:
        tree: The set's JSON: ``icons``, maybe ``aliases``, and ``left``, ``top``, ``width``, ``height`` for all icons
            that do not say their own.
    """
    entries = {**_mapping(tree.get("aliases")), **_mapping(tree.get("icons"))}  # an icon hides an alias of its name
    icons: dict[str, Icon] = {}
    aliases: dict[str, str] = {}
    damaged: dict[str, str] = {}
    for name in sorted(entries):
        try:
            if not is_name(name):
                raise _DamagedError("its name is not of a-z, 0-9 and single hyphens between them")
            chain = _chain(entries, name)
            owner = next(place for place in chain if not _only_renames(entries[place]))
            if owner != name and not _is_hidden(entries, chain):
                _icon(tree, [entries[place] for place in _chain(entries, owner)])
                aliases[name] = owner
            else:
                icons[name] = _icon(tree, [entries[place] for place in chain])
        except _DamagedError as error:
            damaged[name] = str(error)
    return Contents(icons, aliases, damaged)


def is_name(text: str) -> bool:
    """Whether a text can name an icon or a set."""
    return _NAME.fullmatch(text) is not None


def svg_of(icon: Icon, colour: str | None = None) -> bytes:
    """A whole SVG of an icon.

    Args:
        icon: What to draw.
        colour: What ``currentColor`` means, such as ``#336699``; None leaves it to the renderer, which takes black.
    """
    left, top, width, height = icon.left, icon.top, icon.width, icon.height
    body = icon.body
    if not icon.upright:
        middle = f"{left + width / 2} {top + height / 2}"
        back = f"{-left - width / 2} {-top - height / 2}"
        mirror = f"{-1 if icon.h_flip else 1} {-1 if icon.v_flip else 1}"
        moves = f"translate({middle}) rotate({90 * icon.rotate}) scale({mirror}) translate({back})"
        body = f'<g transform="{moves}">{body}</g>'
        if icon.rotate % 2:  # the box turns about its middle
            left, top = left + (width - height) / 2, top + (height - width) / 2
            width, height = height, width
    root = 'xmlns="http://www.w3.org/2000/svg"' + ("" if colour is None else f' color="{colour}"')
    return f'<svg {root} viewBox="{left} {top} {width} {height}">{body}</svg>'.encode()


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _chain(entries: Mapping[str, Any], name: str) -> list[str]:
    """The names from an entry over its parents to the icon."""
    chain = [name]
    while True:
        entry = entries.get(chain[-1])
        if entry is None:
            raise _DamagedError(f"its parent {chain[-1]!r} does not exist")
        if not isinstance(entry, dict):
            raise _DamagedError(f"{chain[-1]!r} is a {type(entry).__name__}, no object")
        if "parent" not in entry:
            return chain
        parent = entry["parent"]
        if not isinstance(parent, str):
            raise _DamagedError(f"parent is {parent!r}, no name")
        if parent in chain:
            raise _DamagedError(f"it is its own parent, over {' and '.join(chain)}")
        chain.append(parent)


def _only_renames(entry: Mapping[str, Any]) -> bool:
    return set(entry) <= {"parent", "hidden"} and "parent" in entry


def _is_hidden(entries: Mapping[str, Any], chain: list[str]) -> bool:
    return bool(next((entries[name]["hidden"] for name in chain if "hidden" in entries[name]), False))


def _icon(tree: Mapping[str, Any], chain: list[Mapping[str, Any]]) -> Icon:
    """Merges an entry with its parents: sizes override, turns add up, two mirrorings cancel."""
    body = chain[-1].get("body")
    if not isinstance(body, str) or not body.strip():
        raise _DamagedError("it has no body")
    merged: dict[str, Any] = {**_DEFAULTS, **{side: tree[side] for side in _DEFAULTS if side in tree}}
    turns = 0
    mirrored = dict.fromkeys(_MIRRORS, False)
    for entry in reversed(chain):
        merged |= {name: entry[name] for name in _OVERRIDDEN if name in entry}
        turn = entry.get("rotate", 0)
        if not isinstance(turn, int):
            raise _DamagedError(f"rotate is {turn!r}; allowed: a number of quarter turns")
        turns += turn
        for name in _MIRRORS:
            mirrored[name] ^= bool(entry.get(name, False))
    for side in _DEFAULTS:
        value = merged[side]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (side in ("width", "height") and value <= 0):
            allowed = "a number above 0" if side in ("width", "height") else "a number"
            raise _DamagedError(f"{side} is {value!r}; allowed: {allowed}")
    return Icon(
        body=body,
        **{side: merged[side] for side in _DEFAULTS},
        rotate=turns % 4,
        h_flip=mirrored["hFlip"],
        v_flip=mirrored["vFlip"],
        hidden=bool(merged.get("hidden", False)),
    )

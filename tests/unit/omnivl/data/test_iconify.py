"""The format of icon sets, checked by the pixels of a body of four coloured quarters."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnivl.data.emoji.iconify import Contents, Icon, read_contents, svg_of
from omnivl.data.emoji.render import draw

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 128, 0), (0, 0, 255), (128, 128, 128)
COLOURS = {RED: "red", GREEN: "green", BLUE: "blue", GREY: "grey"}


def quarters(left: float, top: float, width: float, height: float) -> str:
    """Red, green; blue, grey: upper left, upper right; lower left, lower right of a box."""
    w, h = width / 2, height / 2
    places = ((left, top, "red"), (left + w, top, "green"), (left, top + h, "blue"), (left + w, top + h, "grey"))
    return "".join(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}"/>' for x, y, fill in places)


def seen(icon: Icon) -> list[str]:
    """The colours in the middle of the four quarters, row by row, of what lies in the view box."""
    picture = draw(svg_of(icon), 64)
    alpha = np.asarray(picture)[..., 3]
    rows, columns = np.flatnonzero(alpha.max(axis=1)), np.flatnonzero(alpha.max(axis=0))
    box = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    small = box.convert("RGB").resize((4, 4), Image.Resampling.NEAREST)
    return [COLOURS[small.getpixel(place)] for place in ((0, 0), (3, 0), (0, 3), (3, 3))]  # type: ignore[index]


UPRIGHT = ["red", "green", "blue", "grey"]


def contents(**tree: Any) -> Contents:
    return read_contents({"icons": {"a": {"body": quarters(0, 0, 16, 16)}}, **tree})


def test_the_view_box_is_16_by_16_at_the_origin_unless_said_otherwise() -> None:
    icon = contents().icons["a"]
    assert (icon.left, icon.top, icon.width, icon.height) == (0, 0, 16, 16)
    assert seen(icon) == UPRIGHT
    assert np.asarray(draw(svg_of(icon), 64))[..., 3].min() == 255, "it fills the box"


def test_sizes_of_the_set_hold_for_icons_that_have_none() -> None:
    tree = {
        "left": -4, "top": 2, "width": 24, "height": 12,
        "icons": {"a": {"body": quarters(-4, 2, 24, 12)}, "b": {"body": quarters(3, 2, 24, 5), "left": 3, "height": 5}},
        "aliases": {"c": {"parent": "b", "left": 3, "width": 12}},
    }  # fmt: skip
    found = read_contents(tree).icons
    assert {(icon.left, icon.top, icon.width, icon.height) for icon in found.values()} == {
        (-4, 2, 24, 12),
        (3, 2, 24, 5),
        (3, 2, 12, 5),
    }
    assert seen(found["a"]) == UPRIGHT
    assert seen(found["b"]) == UPRIGHT
    assert seen(found["c"]) == ["red", "red", "blue", "blue"], "the right half is cut off"


TURNS = {
    "quarter": ({"rotate": 1}, ["blue", "red", "grey", "green"]),
    "half": ({"rotate": 2}, ["grey", "blue", "green", "red"]),
    "three quarters": ({"rotate": 3}, ["green", "grey", "red", "blue"]),
    "back": ({"rotate": -1}, ["green", "grey", "red", "blue"]),
    "left and right": ({"hFlip": True}, ["green", "red", "grey", "blue"]),
    "top and bottom": ({"vFlip": True}, ["blue", "grey", "red", "green"]),
    "both mirrors": ({"hFlip": True, "vFlip": True}, ["grey", "blue", "green", "red"]),
    "mirrored, then turned": ({"hFlip": True, "rotate": 1}, ["grey", "green", "blue", "red"]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("box", [(0, 0, 16, 16), (-3, 5, 20, 10), (2, -7, 8, 24)])
def test_an_alias_turns_and_mirrors_its_parent(turn: str, box: tuple[float, float, float, float]) -> None:
    options, colours = TURNS[turn]
    sizes = dict(zip(("left", "top", "width", "height"), box, strict=True))
    tree = {"icons": {"a": {"body": quarters(*box), **sizes}}, "aliases": {"b": {"parent": "a", **options}}}
    found = read_contents(tree)
    assert seen(found.icons["b"]) == colours
    assert seen(found.icons["a"]) == UPRIGHT
    opaque = np.asarray(draw(svg_of(found.icons["b"]), 48))[..., 3] > 0
    width, height = (box[3], box[2]) if options.get("rotate", 0) % 2 else (box[2], box[3])
    assert opaque.mean() == pytest.approx(min(width, height) / max(width, height), abs=0.05), "nothing leaves the box"


def test_turns_add_up_and_two_mirrors_cancel() -> None:
    aliases = {
        "b": {"parent": "a", "rotate": 3, "hFlip": True},
        "c": {"parent": "b", "rotate": 2, "hFlip": True},
        "d": {"parent": "c"},
    }
    found = contents(aliases=aliases)
    assert (found.icons["c"].rotate, found.icons["c"].h_flip) == (1, False)
    assert found.aliases == {"d": "c"}
    assert seen(found.icons["c"]) == TURNS["quarter"][1]


def test_an_alias_that_changes_nothing_is_a_further_name() -> None:
    found = contents(aliases={"b": {"parent": "a"}, "c": {"parent": "b"}})
    assert set(found.icons) == {"a"}
    assert found.aliases == {"b": "a", "c": "a"}


def test_hidden_is_inherited_and_can_be_taken_back() -> None:
    icons = {"a": {"body": "<g/>"}, "old": {"body": "<g/>", "hidden": True}}
    aliases = {
        "older": {"parent": "old"},
        "again": {"parent": "old", "rotate": 1, "hidden": False},
        "secret": {"parent": "a", "hidden": True},
        "turned": {"parent": "old", "rotate": 1},
    }
    found = read_contents({"icons": icons, "aliases": aliases})
    assert {name: icon.hidden for name, icon in found.icons.items()} == {
        "a": False,
        "old": True,
        "older": True,
        "again": False,
        "secret": True,
        "turned": True,
    }
    assert not found.aliases, "a hidden name is no further name of a listed icon"


def test_damaged_entries_are_named_and_harm_no_other() -> None:
    icons = {
        "good": {"body": quarters(0, 0, 16, 16)},
        "text": "<path/>",
        "empty": {"body": " "},
        "none": {},
        "flat": {"body": "<g/>", "height": 0},
        "wide": {"body": "<g/>", "width": "24"},
        "nan": {"body": "<g/>", "left": float("nan")},
        "bent": {"body": "<g/>", "rotate": 0.5},
        "../up": {"body": "<g/>"},
    }
    aliases = {
        "lost": {"parent": "nothing"},
        "loop": {"parent": "pool"},
        "pool": {"parent": "loop"},
        "odd": {"parent": 3},
        "of-text": {"parent": "text"},
        "of-flat": {"parent": "flat"},
        "mended": {"parent": "flat", "height": 4},
        "good": {"parent": "nothing"},
    }
    found = read_contents({"icons": icons, "aliases": aliases})
    assert set(found.icons) == {"good", "mended"}
    assert found.damaged == {
        "text": "'text' is a str, no object",
        "empty": "it has no body",
        "none": "it has no body",
        "flat": "height is 0; allowed: a number above 0",
        "wide": "width is '24'; allowed: a number above 0",
        "nan": "left is nan; allowed: a number",
        "bent": "rotate is 0.5; allowed: a number of quarter turns",
        "../up": "its name is not of a-z, 0-9 and single hyphens between them",
        "lost": "its parent 'nothing' does not exist",
        "loop": "it is its own parent, over loop and pool",
        "pool": "it is its own parent, over pool and loop",
        "odd": "parent is 3, no name",
        "of-text": "'text' is a str, no object",
        "of-flat": "height is 0; allowed: a number above 0",
    }
    for tree in ({}, {"icons": [1]}, {"icons": {}, "aliases": None}):
        assert read_contents(tree) == Contents({}, {}, {})


def test_the_colour_is_that_of_current_color() -> None:
    icon = Icon('<rect width="16" height="16" fill="currentColor"/>')
    assert draw(svg_of(icon, "#2040c0"), 8).getpixel((4, 4)) == (0x20, 0x40, 0xC0, 255)
    assert draw(svg_of(icon), 8).getpixel((4, 4)) == (0, 0, 0, 255)


def test_an_icon_stands_in_the_middle_of_a_square() -> None:
    alpha = np.asarray(draw(svg_of(Icon(quarters(0, 0, 32, 16), width=32)), 32))[..., 3]
    assert (alpha[8:24] == 255).all()
    assert (alpha[:8] == 0).all() and (alpha[24:] == 0).all()

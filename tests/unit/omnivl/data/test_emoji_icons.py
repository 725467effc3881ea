"""Icon sets: names and code points of concepts, sizes, aliases, licences."""

import json
from pathlib import Path
from typing import Any

import pytest
from tar_files import write_tar

from omnivl.data.emoji.icons import read_icons, slug
from omnivl.data.emoji.join import Concept
from omnivl.errors import DataError

ICONS = {
    "width": 24,
    "icons": {"red-apple": {"body": "<path/>"}, "hat": {"body": "<g/>", "width": 32, "left": 2}},
    "aliases": {"cap": {"parent": "hat"}, "turned": {"parent": "hat", "rotate": 1}, "lost": {"parent": "nothing"}},
}


def archive(folder: Path, **changes: Any) -> Path:
    files = {"icons": ICONS, "info": {"name": "Set", "license": {"spdx": "MIT"}}, "chars": {"1F9E2": "cap"}} | changes
    members = {f"package/{name}.json": json.dumps(tree).encode() for name, tree in files.items()}
    return write_tar(folder / "set.tgz", members, "w:gz")


def concept(hexcode: str, name: str) -> Concept:
    return Concept(hexcode, name, (), "objects", "clothing", hexcode, hexcode)


def test_concepts_are_joined_by_code_points_and_by_name(tmp_path: Path) -> None:
    icons = read_icons(archive(tmp_path))
    assert (icons.title, icons.license) == ("Set", "MIT")
    drawn = icons.drawings([concept("1f34e", "red apple"), concept("1f9e2", "billed cap"), concept("1f34f", "apple")])
    assert set(drawn) == {"1f34e", "1f9e2"}
    assert drawn["1f9e2"] == b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="2 0 32 16"><g/></svg>'
    assert b'viewBox="0 0 24 16"' in drawn["1f34e"]


def test_an_alias_that_turns_its_parent_is_left_out(tmp_path: Path) -> None:
    assert set(read_icons(archive(tmp_path)).icons) == {"red-apple", "hat", "cap"}


def test_names_as_icon_sets_write_them() -> None:
    assert slug("A button (blood type)") == "a-button-blood-type"
    assert slug("UP! button") == "up-button"


def test_a_set_without_a_licence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="states no licence"):
        read_icons(archive(tmp_path, info={"name": "Set"}))

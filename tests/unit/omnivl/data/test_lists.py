"""The embedded lists are those of the embedded sources."""

import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.lists import EMBEDDED_LISTS, embedded_list
from omnivl.data.sources import open_source
from omnivl.data.sources.emoji import open_emoji


@pytest.mark.parametrize(("name", "field"), [("emoji", "name"), ("emoji_labels", "label")])
def test_names_and_classes_are_those_of_the_drawings(name: str, field: str) -> None:
    drawings = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where={"style": ("fluent",)}))
    found = dict.fromkeys(str(drawings.read(index).meta[field]) for index in range(len(drawings)))
    assert embedded_list(name) == tuple(found)


def test_motions_are_those_of_the_generator() -> None:
    where = {"style": ("fluent",)}
    source = open_source(DataEntryConfig(source="motion", kind="video_label", where=where), seed=0)
    assert embedded_list("motions") == source.classes  # type: ignore[attr-defined]


def test_every_list_has_each_entry_once() -> None:
    for name in EMBEDDED_LISTS:
        entries = embedded_list(name)
        assert len(entries) == len(set(entries)) > 1
        assert all(entry == entry.strip() != "" for entry in entries)

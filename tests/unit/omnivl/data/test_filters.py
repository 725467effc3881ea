"""What ``where`` keeps: texts, numbers, comparisons; the same in lists and streams."""

import json

import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.filters import value_matches
from omnivl.data.metadata import MAX_VALUES
from omnivl.data.sources import open_source
from omnivl.data.sources.stream import StreamReader
from omnivl.errors import DataError


@pytest.mark.parametrize(
    ("value", "allowed", "kept"),
    [
        (3, "3", True),
        (3.0, "3", True),
        (2000, "2e3", True),
        (3, "3.5", False),
        ("3", "3", True),
        (256, ">= 256", True),
        (255.9, ">=256", False),
        (0.5, ">= 0.3 < 0.9", True),
        (0.9, ">= 0.3 < 0.9", False),
        (-1, "< 0", True),
        (1e-3, "<= .001", True),
        (True, ">= 0", False),
        (True, "true", True),
        ("300", ">= 256", False),
        (">= 256", ">= 256", True),
        (None, ">= 0", False),
        ([1, 300], "> 256", True),
        ([], "> 256", False),
        (300, "> 256 or so", False),
        (300, ">", False),
        (300, "", False),
        (10**400, "> 0", False),
        (float("nan"), ">= 0", False),
    ],
)
def test_values(value, allowed, kept):
    assert value_matches(value, (allowed,)) is kept
    assert value_matches(value, ("something else", allowed)) is kept


@pytest.fixture
def scored(write_tar, png):
    """6,000 texts: each with a score and a name of its own, every fourth without a score."""
    members = []
    for number in range(6000):
        fields = {"caption": "x", "name": f"n{number}", "width": number % 7} | (
            {"score": number / 6000} if number % 4 else {}
        )
        members.append((f"{number:04d}.json", json.dumps(fields).encode()))
    return str(write_tar(members))


@pytest.mark.parametrize(
    "where",
    [
        {"score": (">= 0.5 < 0.75",)},
        {"score": ("< 0.1", "> 0.9")},
        {"width": (">= 5",)},
        {"width": ("3", "4.0"), "score": ("<= 0.5",)},
        {"score": ("0.25",)},
    ],
)
def test_fields_with_a_value_for_each_sample_are_filtered_by_their_numbers(scored, where):
    """More different values than are listed: lists give what a slow reading gives, and streams too."""

    def wanted(fields: dict[str, object]) -> bool:
        return all(name in fields and value_matches(fields[name], allowed) for name, allowed in where.items())

    described = (
        (number, {"width": number % 7} | ({"score": number / 6000} if number % 4 else {})) for number in range(6000)
    )
    expected = [f"{number:04d}" for number, fields in described if wanted(fields)]
    config = DataEntryConfig(scored, "text", where=where)
    if not expected:
        with pytest.raises(DataError, match="no sample of kind text is left"):
            open_source(config, seed=0)
        return
    source = open_source(config, seed=0)
    assert [source.read(row).key for row in range(len(source))] == expected
    stream_config = DataEntryConfig(f"pipe:cat {scored}", "text", where=where)
    stream = StreamReader(stream_config, key="k", seed=0, buffer=1, reader=0, readers=1, first_shard=0)
    assert [stream.next().key for _ in expected] == expected


def test_a_field_of_too_many_texts_cannot_be_filtered_by(scored):
    with pytest.raises(DataError) as error:
        open_source(DataEntryConfig(scored, "text", where={"name": ("n3",)}), seed=0)
    assert str(error.value) == (
        f"{scored}: the field 'name' has more than {MAX_VALUES} different values that are no numbers; allowed in "
        "'where' are fields with fewer; filter by another one"
    )


def test_an_index_that_is_read_back_filters_alike(scored):
    where = {"score": (">= 0.5",)}
    first = len(open_source(DataEntryConfig(scored, "text", where=where), seed=0))
    assert first == len(open_source(DataEntryConfig(scored, "text", where=where), seed=0)) == 3000 - 750

"""Lists of answers and classes, counted in shards."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tar_files import write_tar

from omnivl.data.values import count_values, most_frequent
from omnivl.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    samples = [
        {"answers": ["red", "red", "blue"], "count": 3, "label": "b"},
        {"answers": ["blue"], "count": 3, "label": "a"},
        {"answers": ["green", ""], "label": "b"},
        {"lines": "a\nb"},
    ]
    files = {f"{place}.json": json.dumps({"caption": "c", **one}).encode() for place, one in enumerate(samples)}
    write_tar(tmp_path / "one.tar", files)
    return tmp_path


def test_every_entry_of_a_list_counts(shards: Path) -> None:
    assert count_values([str(shards)], "answers") == Counter({"red": 2, "blue": 2, "green": 1})
    assert count_values([str(shards / "one.tar")] * 2, "answers")["green"] == 2
    assert count_values([str(shards)], "count") == Counter({"3": 2})
    assert count_values([str(shards)], "label") == Counter({"b": 2, "a": 1})
    assert not list(shards.glob("*.index.safetensors")), "nothing is written beside the shards"


def test_the_most_frequent_come_first_and_equal_ones_by_the_alphabet() -> None:
    counts = Counter({"red": 2, "blue": 2, "green": 1, "grey": 5})
    assert most_frequent(counts) == ["grey", "blue", "red", "green"]
    assert most_frequent(counts, least=2) == ["grey", "blue", "red"]
    assert most_frequent(counts, most=2) == ["grey", "blue"]


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("one.tar", "colour", "no sample of .*one.tar has a text or a number in its field 'colour'; allowed: a field"),
        ("one.tar", "lines", r"a value of 'lines' has several lines: 'a\\nb'; allowed: texts of one line; mend it"),
        ("gone.tar", "label", "1 of 1 shards cannot be read"),
        ("scenes", "label", "scenes: it is generated; allowed are shards on a disk; name them"),
        ("pipe:cat x", "label", "pipe:cat x: it is a stream; allowed are shards on a disk; name them"),
    ],
)
def test_what_gives_no_list_is_refused(shards: Path, source: str, field: str, message: str) -> None:
    named = str(shards / source) if source.endswith(".tar") else source
    with pytest.raises(DataError, match=message):
        count_values([named], field)

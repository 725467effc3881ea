"""Brace patterns: as bash expands them, and in bounded time and memory."""

import random
import shutil
import time
import tracemalloc

import patience
import pytest

from omnivl.data.sources.braces import MAX_SHARDS, expand_braces
from omnivl.data.sources.patterns import expand_pattern, is_glob
from omnivl.data.sources.stream import expand_stream
from omnivl.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x{a,b}y", ["xay", "xby"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{11..8..-2}{,z}", ["11", "11z", "9", "9z"]),
        ("{0..9..4}", ["0", "4", "8"]),
        ("{3..3}", ["3"]),
        ("{10..8}", ["10", "9", "8"]),
        ("{1..003}", ["001", "002", "003"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a,{b,c}}", ["a", "b", "c"]),
        ("{a{1,2},b}.tar", ["a1.tar", "a2.tar", "b.tar"]),
        ("{{0..1},{5..6}}", ["0", "1", "5", "6"]),
        ("{abc}", ["{abc}"]),
        ("{}", ["{}"]),
        ("{a{1,2}}", ["{a1}", "{a2}"]),
        ("{a,{b,c}", ["{a,b", "{a,c"]),
        ("a},{b", ["a},{b"]),
        ("a,b", ["a,b"]),
        ("{0..}{..1}", ["{0..}{..1}"]),
        ("", [""]),
    ],
)
def test_by_hand(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_as_bash_does():
    """Drawn at random, without ``{}``, which bash never takes for the end of a brace."""
    draw = random.Random(0)
    pieces = ["{", "{", "}", "}", ",", ",", "a", "b", "x", "{0..3}", "{07..10}", "{9..1..3}", "{p,q}", "{r,{s,t}}"]
    patterns = ["x" + "".join(draw.choices(pieces, k=draw.randint(1, 9))) for _ in range(600)]
    patterns = [pattern for pattern in patterns if "{}" not in pattern]
    assert len(patterns) > 300
    script = "set -f; " + "; ".join(f"printf '%s ' {pattern}; echo" for pattern in patterns)
    lines = patience.run(["bash", "-c", script], limit=60, capture_output=True, text=True, check=True).stdout
    for pattern, line in zip(patterns, lines.splitlines(), strict=True):
        assert expand_braces(pattern) == line.split(), pattern


@pytest.mark.parametrize(
    "pattern",
    [
        f"{{0..{MAX_SHARDS}}}.tar",
        "{0..999}/{0..1000}.tar",
        "{0..50000000}.tar",
        "{0..999999999999999999}.tar",
        "{0..9}" * 300,
        "{a,b}" * 20,
        "{a,b}" * 50_000,
        "{0..9}{" + "," * 100_000 + "}",
        "{{0..600000},{0..600000}}",
        "{0..999999}" + "a" * 1_000,
        "{0..999999}" + "{0..0}" * 1_000,
        "{x{0..999},y{0..999999}}",
    ],
    ids=lambda pattern: pattern[:24],
)
def test_patterns_that_stand_for_too_many_shards(pattern):
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(DataError, match=r": more than 1,000,000 shards; name fewer, or make larger ones$"):
        expand_braces(pattern)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20
    assert time.process_time() - began < 30


@pytest.mark.parametrize("expand", [expand_pattern, expand_stream, lambda text: is_glob(f"{text}*")])
def test_wherever_sources_are_expanded(expand):
    with pytest.raises(DataError, match=r": more than 1,000,000 shards"):
        expand("{0..999}/{0..1000}.tar")


def test_as_many_shards_as_are_allowed():
    assert len(expand_braces(f"{{1..{MAX_SHARDS}}}.tar")) == MAX_SHARDS == 1_000_000


@pytest.mark.parametrize(
    "pattern", ["," * 500_000, "{a}" * 200_000, "}" * 500_000, "{" + "a," * 300_000, "{}" * 200_000], ids=str.__len__
)
def test_long_patterns_take_time_in_proportion(pattern):
    began = time.process_time()
    assert expand_braces(pattern) == [pattern]
    assert time.process_time() - began < 10


def test_braces_within_many_others():
    with pytest.raises(DataError, match="braces within more than 32 others; write fewer"):
        expand_braces("{" * 5_000 + "a" + ",b}" * 5_000)
    assert len(expand_braces("{" * 32 + "a" + ",b}" * 32)) == 33

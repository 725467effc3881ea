import numpy as np
import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.text import choose_text, may_flip, sample_identity


def sample(**fields: object) -> Sample:
    return Sample("k", "s.tar:k", b"", "png", **fields)


def entry(kind: str = "image_text", **fields: object) -> DataEntryConfig:
    return DataEntryConfig("src", kind, **fields)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("a cat on a mat", True),
        ("a cat to the left of a mat", False),
        ("Right arrow", False),
        ("moving leftwards", False),
        ("a star that turns clockwise", False),
        ("a star that turns counter-clockwise", False),
        ("anticlockwise arrows", False),
        ("the copyright sign, bright and upright", True),
        ("a cleft stone", True),
        ("left-pointing", False),
    ],
)
def test_texts_with_a_direction_forbid_the_mirror(text, allowed):
    assert may_flip(text) is allowed


def test_other_languages():
    assert not may_flip("Pfeil nach links", "de")
    assert may_flip("Katze", "de")
    assert not may_flip("whatever", "xx"), "nobody knows its directions"


def test_caption_policies():
    three = sample(captions=("one", "two", "three"))
    assert choose_text(three, entry(), np.random.default_rng(0)) == "one"
    drawn = {choose_text(three, entry(caption="random"), np.random.default_rng(seed)) for seed in range(40)}
    assert drawn == {"one", "two", "three"}
    assert choose_text(three, entry(caption="random"), None) == "one"
    joined = {choose_text(three, entry(caption="join"), np.random.default_rng(seed)) for seed in range(60)}
    assert len(joined) == 6, "all orders"
    assert choose_text(three, entry(caption="join"), None) == "one, two, three"


def test_prompts():
    config = entry("image_label", prompts=("a {label}", "one {label}"))
    drawn = {choose_text(sample(label="cat"), config, np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {"a cat", "one cat"}
    assert choose_text(sample(label="{x}"), config, None) == "a {x}", "braces of a label are only text"


@pytest.mark.parametrize(("kind", "cause"), [("image_text", "missing_caption"), ("video_label", "missing_label")])
def test_missing_text(kind, cause):
    with pytest.raises(BadSampleError) as error:
        choose_text(sample(), entry(kind), None)
    assert error.value.rejection.cause == cause


def test_identities():
    caption = sample_identity(sample(captions=("A  Cat",)), entry())
    assert caption == sample_identity(sample(captions=("a cat", "other")), entry()), "case and spaces do not count"
    assert caption != sample_identity(sample(captions=("a dog",)), entry())
    still = sample_identity(sample(captions=("a cat",), identity="1f408"), entry("image_text"))
    clip = sample_identity(sample(captions=("the cat moves",), identity="1f408"), entry("video_text"))
    assert still == clip, "one concept, still or clip"
    label = sample_identity(sample(label="cat"), entry("image_label"))
    assert label == sample_identity(sample(label="cat", identity="x"), entry("video_label"))
    assert label != sample_identity(sample(label="cat"), DataEntryConfig("other", "image_label"))

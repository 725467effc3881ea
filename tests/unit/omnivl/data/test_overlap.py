"""Samples of a test set that are in the training set."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from omnivl.data import overlap
from omnivl.data.config import DataEntryConfig
from omnivl.data.decode import decode_still
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.overlap import Overlap, described, find_overlap
from omnivl.data.overlap_page import render_overlap
from omnivl.data.picture_signature import THRESHOLD, VIEWS, WIDTH, signature, signatures
from omnivl.data.sources import open_source
from omnivl.data.sources.base import BadSampleError, Rejection, Sample
from omnivl.errors import DataError

Pixels = NDArray[np.uint8]


class Listed:
    """Samples in memory; None for one that cannot be read."""

    classes: tuple[str, ...] = ()
    rejections: Sequence[Rejection] = ()

    def __init__(self, *samples: Sample | None) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        found = self.samples[index]
        if found is None:
            raise BadSampleError("broken_image", f"list:{index}", "gone")
        return found


def png(pixels: Pixels, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def sample(name: str, pixels: Pixels, *captions: str, form: str = "PNG", **options: Any) -> Sample:
    return Sample(name, f"list:{name}", png(pixels, form, **options), form.lower(), captions=captions)


@pytest.fixture(scope="module")
def drawings() -> list[Pixels]:
    where = {"style": ("noto",), "label": ("fruit", "bugs")}
    source = open_source(DataEntryConfig(source="emoji", kind="image", where=where), seed=0)
    return [decode_still(source.read(place), DEFAULT_LIMITS)[0] for place in range(20)]


def found_in(train: Listed, test: Listed, threshold: float = THRESHOLD, **options: Any) -> Overlap:
    return find_overlap(train, test, signatures, threshold, spelled=str.lower, **options)


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "as it is": lambda pixels: pixels,
    "half as large": lambda pixels: cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "stretched": lambda pixels: cv2.resize(pixels, (120, 96), interpolation=cv2.INTER_AREA),
    "darker": lambda pixels: (pixels * 0.6).astype(np.uint8),
    "mirrored": lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_copies_are_found_and_other_drawings_are_not(drawings: list[Pixels], name: str, form: str) -> None:
    train = Listed(*(sample(f"train{place}", CHANGES[name](one), form=form) for place, one in enumerate(drawings)))
    test = Listed(*(sample(f"test{place}", one) for place, one in enumerate(drawings)))
    found = found_in(train, test)
    assert [(pair.test, pair.train) for pair in found.pairs] == [(place, place) for place in range(20)]
    if name == "mirrored":
        views = {described(pair, VIEWS)["view"] for pair in found.pairs}
        assert "mirrored" in views, "drawings that are symmetric are found as they are"
    figures = found.figures()
    assert figures["test_pictures_found"] == figures["picture_pairs"] == 20
    same = name == "as it is" and form == "PNG"
    assert figures["test_pictures_found_as_the_same_file"] == (20 if same else 0)


def test_crops_are_not_found(drawings: list[Pixels]) -> None:
    """What is said of the signature in the docs."""
    train = Listed(*(sample(f"train{place}", one[10:-10, 10:-10]) for place, one in enumerate(drawings)))
    test = Listed(*(sample(f"test{place}", one) for place, one in enumerate(drawings)))
    assert not found_in(train, test).pairs


@pytest.mark.parametrize("block", [1, 7, 512])
def test_blocks_change_nothing(drawings: list[Pixels], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Listed(
        *(sample(f"train{place}", one, f"picture number {place % 3} here") for place, one in enumerate(drawings))
    )
    test = Listed(*(sample(f"test{place}", one, "Picture number 1 here") for place, one in enumerate(drawings[5:9])))
    whole = found_in(train, test, 0.3, most=3)
    monkeypatch.setattr(overlap, "BLOCK", block)
    monkeypatch.setattr(overlap, "LARGEST_BLOCK", 3 * block)
    told: list[int] = []
    again = found_in(train, test, 0.3, most=3, progress=told.append)
    assert again.figures() == whole.figures()
    assert [(pair.test, pair.train, pair.what) for pair in again.pairs] == [
        (pair.test, pair.train, pair.what) for pair in whole.pairs
    ]
    assert told == [*range(block, 20, block), 20]


def test_the_most_alike_pairs_are_kept_and_all_are_counted(drawings: list[Pixels]) -> None:
    one = drawings[0]
    darker = (one * 0.5).astype(np.uint8)
    test = Listed(sample("test", one))
    train = Listed(
        *(sample(f"copy{place}", darker, form="JPEG", quality=60) for place in range(4)), sample("same", one)
    )
    found = found_in(train, test, most=2)
    assert found.figures()["picture_pairs"] == 5
    first, second = found.pairs
    assert (first.train, first.identical) == (4, True)
    assert first.similarity > second.similarity
    assert not second.identical


def test_texts_are_found_by_their_spelling() -> None:
    plain = np.zeros((8, 8, 3), dtype=np.uint8)
    test = Listed(
        sample("t0", plain, "A dog on the grass", "a cat"),
        sample("t1", plain + 1, "a DOG on the GRASS", "a dog on the grass"),
        sample("t2", plain + 2, "three words only"),
    )
    train = Listed(sample("x", plain + 3, "a cat", "a dog on the grass"), sample("y", plain + 4, "three words only"))
    found = found_in(train, test)
    assert [described(pair, VIEWS) for pair in found.pairs] == [
        {"what": "text", "test": "list:t0", "train": "list:x", "text": "A dog on the grass"},
        {"what": "text", "test": "list:t1", "train": "list:x", "text": "a DOG on the GRASS"},
    ]
    assert found.figures()["test_samples_with_both"] == 0
    assert len(found_in(train, test, min_words=2).pairs) == 3, "one pair of samples, however many texts they share"


def test_pictures_of_one_colour_and_broken_ones_are_found_only_as_the_same_file() -> None:
    red = np.full((8, 8, 3), (200, 0, 0), dtype=np.uint8)
    assert not signature(red).any()
    broken = Sample("b", "list:b", b"no picture", "png")
    test = Listed(sample("t", red), broken, None, sample("other", np.full((8, 8, 3), 7, dtype=np.uint8)))
    train = Listed(None, broken, sample("r", red), sample("larger", np.full((9, 9, 3), (200, 0, 0), dtype=np.uint8)))
    found = found_in(train, test)
    assert [(pair.test, pair.train, pair.identical) for pair in found.pairs] == [(0, 2, True), (1, 1, True)]
    figures = found.figures()
    assert (figures["unread_test_pictures"], figures["unread_training_pictures"]) == (2, 2)
    with pytest.raises(DataError, match="none of 2 test samples can be read"):
        found_in(train, Listed(broken, None))


def test_a_clip_compares_by_its_middle_frame(drawings: list[Pixels]) -> None:
    frames = np.stack(drawings[:3])
    test = Listed(replace(sample("clip", drawings[0]), media=None, frames=frames))
    train = Listed(sample("middle", drawings[1]), sample("first", drawings[0]))
    assert [pair.train for pair in found_in(train, test).pairs] == [0]


def test_signatures_have_length_one() -> None:
    places, made = signatures([sample("a", np.eye(9, dtype=np.uint8)[..., None].repeat(3, 2) * 200)], test=True)
    assert (places, made.shape) == ([0], (1, 2, WIDTH))
    np.testing.assert_allclose(np.linalg.norm(made, axis=2), 1.0, rtol=1e-5)


def test_the_page_shows_both_sides_and_escapes_texts(drawings: list[Pixels]) -> None:
    test = Listed(sample("t", drawings[0], "<b>a text of five words</b>"))
    train = Listed(sample("x", drawings[0], "<b>a text of five words</b>"), None)
    page = render_overlap(found_in(train, test), train, test, "t in <x>")
    assert page.count('<img src="data:image/webp') == 4, "a pair of pictures and one of texts"
    assert "the same file" in page
    assert "equal texts: &lt;b&gt;a text" in page
    assert "<b>a text" not in page
    assert "t in &lt;x&gt;" in page


def test_pairs_are_json(drawings: list[Pixels]) -> None:
    source = Listed(sample("x", drawings[0]))
    (pair,) = found_in(source, source).pairs
    read = json.loads(json.dumps(described(pair, VIEWS)))
    assert (read["what"], read["identical"], read["view"]) == ("picture", True, "whole")
    assert read["similarity"] == pytest.approx(1.0, abs=1e-4)
    assert "view" not in described(pair, ()), "vectors of a model have no names"

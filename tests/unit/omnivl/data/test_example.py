"""At which size pictures that keep their own are decoded, and views of training."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from omnivl.data.augment import TrainingDraw
from omnivl.data.collate import Collator
from omnivl.data.config import AugmentConfig, DataEntryConfig
from omnivl.data.decode import Header, decode_shrunk
from omnivl.data.example import ExampleReader, PixelCache
from omnivl.data.fields import Field
from omnivl.data.jpeg import SHRINKS
from omnivl.data.limits import DecodeLimits
from omnivl.data.sizes import InputSizes
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.tokenizer import load_tokenizer
from omnivl.data.work import pack
from omnivl.inference.pictures import PictureSet
from omnivl.randomness import Streams

NATIVE = InputSizes(
    image_size=64, video_size=64, num_frames=2, patch_size=8, tubelet_size=1, text_length=6, native=True
)
SQUARES = InputSizes(image_size=64, video_size=64, num_frames=2, patch_size=8, tubelet_size=1, text_length=6)


def jpeg(width: int, height: int) -> bytes:
    across = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return bytes(cv2.imencode(".jpg", across.astype(np.uint8))[1])


def reader(sizes: InputSizes = NATIVE, pictures: tuple[str, ...] = (), *, training: bool = False) -> ExampleReader:
    augment = AugmentConfig(crop_scale=(0.25, 1.0), flip=0)
    config = DataEntryConfig("s", "image_text", augment=augment, pictures=pictures)
    return ExampleReader(config, None, sizes, key="k", seed=0, limits=DecodeLimits(), training=training)


def decoded(
    monkeypatch: pytest.MonkeyPatch, made: ExampleReader, sample: Sample, position: int = 0
) -> list[tuple[int, int]]:
    """(width, height) to which the pictures of a sample are decoded."""
    sizes = []

    def kept(shown: Sample, header: Header, limits: DecodeLimits, shrink: int, device: str | None) -> np.ndarray:
        pixels = decode_shrunk(shown, header, limits, shrink, device)
        sizes.append((pixels.shape[2], pixels.shape[1]))
        return pixels

    monkeypatch.setattr("omnivl.data.example.decode_shrunk", kept)
    made.finish(replace(sample, captions=("a cat",)), position)
    return sizes


def pair(*sides: tuple[int, int]) -> Sample:
    files = {f"{number}.jpg": jpeg(*one) for number, one in enumerate(sides)}
    return Sample("k", "s.tar:k", captions=("a cat",), members=files)


def test_each_picture_of_a_set_is_decoded_as_large_as_the_first_ones_view_needs(monkeypatch):
    both = ("0", "1")
    assert NATIVE.native_size(False, 2400, 300) == (184, 16)
    sizes = decoded(monkeypatch, reader(pictures=both), pair((2400, 300), (300, 2400)))
    assert sizes[1] == (300, 2400), "half would be too few columns for 184"
    sizes = decoded(monkeypatch, reader(pictures=both), pair((2400, 300), (1600, 1600)))
    assert sizes[1] == (200, 200), "a large one is still decoded at an eighth"


@pytest.mark.parametrize("sizes", [NATIVE, SQUARES])
def test_in_training_a_picture_is_decoded_at_the_scale_of_its_own_crop(monkeypatch, sizes):
    made, seen = reader(sizes, training=True), set()
    size = (64, 64) if sizes.native else 64
    for position in range(30):
        random = Streams(0, "k", "augment").at(position)
        draw = TrainingDraw(made.config.augment, random, flip_allowed=True)
        allowed = draw.reduction(1000, 1000, size)
        ((width, height),) = decoded(monkeypatch, made, Sample("k", "w", jpeg(1000, 1000), "jpg"), position)
        shrink = round(1000 / width)
        assert width == height and shrink in SHRINKS
        assert shrink <= allowed and (shrink == 8 or 2 * shrink > allowed)
        seen.add(shrink)
    assert seen == {4, 8}, "crops of half to all of a side, 500 to 1000 pixels, for 64"


def test_views_of_one_position_do_not_depend_on_the_cache():
    shown = [Sample("k", f"w{number}", jpeg(600, 400), "jpg", captions=("a",)) for number in range(2)]
    config = DataEntryConfig("s", "image_text", augment=AugmentConfig(crop_scale=(0.1, 1.0)))

    def made(cache: PixelCache | None) -> ExampleReader:
        return ExampleReader(config, None, SQUARES, key="k", seed=0, limits=DecodeLimits(), cache=cache)

    with_cache, plain = made(PixelCache(1000)), made(None)
    for position in range(40):
        sample = shown[position % 2]
        expected = plain.finish(sample, position).pictures
        assert np.array_equal(with_cache.finish(sample, position).pictures, expected)


def test_a_picture_alone_is_decoded_at_the_shorter_side_of_its_view(monkeypatch):
    assert decoded(monkeypatch, reader(), Sample("k", "w", jpeg(2400, 300), "jpg", captions=("a",))) == [(300, 38)]
    assert decoded(monkeypatch, reader(pictures=("0",)), pair((2400, 300))) == [(300, 38)]


def test_a_set_of_squares_is_decoded_at_their_side(monkeypatch):
    sizes = decoded(monkeypatch, reader(SQUARES, ("0", "1")), pair((2400, 300), (300, 2400)))
    assert sizes == [(600, 75), (75, 600)]


@pytest.mark.parametrize("member", [False, True])
def test_a_picture_is_checked_before_its_size_is_used(monkeypatch, member):
    png = bytes(cv2.imencode(".png", np.zeros((1, 4, 3), np.uint8))[1])
    png = png[:16] + (400_000_000).to_bytes(4, "big") + png[20:]
    sample = Sample("k", "w", png, "png", captions=("a",), members={"0.png": png})
    made = reader(pictures=("0",) if member else ())
    monkeypatch.setattr("omnivl.data.example.still_size", lambda *_: pytest.fail("asked for a size"))
    with pytest.raises(BadSampleError, match=r"too_many_pixels: 400000000 x 1 pixels") as caught:
        made.finish(sample, 0)
    assert caught.value.rejection.where == ("w.0.png" if member else "w")


def test_a_crop_that_keeps_a_box_shows_it_whole():
    config = DataEntryConfig("s", "image_text", fields={"box": "box"}, augment=AugmentConfig(keep="box", flip=0))
    asked = {"box": Field("boxes")}
    made = ExampleReader(config, None, SQUARES, key="k", seed=0, limits=DecodeLimits(), asked=asked)
    sample = Sample("k", "s.tar:k", jpeg(600, 400), "jpg", captions=("a",), meta={"box": [0.1, 0.5, 0.2, 0.9]})
    for position in range(40):
        placed = made.finish(sample, position).fields["box"]
        assert placed.present.all()
        left, top, right, bottom = placed.values[0]
        assert right - left >= 0.0995 and bottom - top >= 0.3995


def test_whole_pictures_are_seen_stretched():
    stretched = replace(SQUARES, stretched=True)
    sample = Sample("k", "s.tar:k", jpeg(600, 400), "jpg", captions=("a",))
    config = DataEntryConfig("s", "image_text", augment=AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0))
    training = ExampleReader(config, None, stretched, key="k", seed=0, limits=DecodeLimits()).finish(sample, 0)
    assert training.pictures.shape == (1, 64, 64, 3)
    row = training.pictures[0, 32, :, 0].astype(int)
    assert row[0] < 6 and row[-1] > 249, "the ramp from its left to its right end"
    square = ExampleReader(config, None, SQUARES, key="k", seed=0, limits=DecodeLimits()).finish(sample, 0)
    assert square.pictures[0, 32, 0, 0] > 30, "the middle square"
    (seen,) = PictureSet.of([sample], "image", stretched).shown([0])
    assert np.array_equal(seen[0, 0].numpy(), training.pictures[0, ..., 0])
    placed, _ = PictureSet.of([sample], "image", stretched).placement(0).boxes(np.array([[0.0, 0.0, 1.0, 1.0]]))
    assert placed.tolist() == [[0, 0, 1, 1]]


def test_a_second_view_has_draws_of_its_own_and_leaves_the_first_as_it_is():
    sample = Sample("k", "s.tar:k", captions=("a cat",), media=jpeg(90, 60), extension="jpg")
    one = reader(SQUARES, training=True).finish(sample, 5)
    assert one.second_view is None
    both = two_views(training=True)
    made = both.finish(sample, 5)
    np.testing.assert_array_equal(made.pictures, one.pictures)
    assert made.second_view.shape == made.pictures.shape
    assert (made.second_view != made.pictures).any()
    np.testing.assert_array_equal(both.finish(sample, 5).second_view, made.second_view)
    assert (both.finish(sample, 6).second_view != made.second_view).any()
    assert two_views(training=False).finish(sample, 5).second_view is None


def two_views(training: bool) -> ExampleReader:
    made = reader(SQUARES)
    config = replace(made.config, views=2)
    return ExampleReader(config, None, SQUARES, key="k", seed=0, limits=DecodeLimits(), training=training)


def test_second_views_reach_the_training_process_in_their_order():
    samples = [Sample("k", "s.tar:k", captions=("a cat",), media=jpeg(90, 60 + 8 * n), extension="jpg") for n in (0, 1)]
    examples = [two_views(training=True).finish(sample, place) for place, sample in enumerate(samples)]
    batch = Collator(SQUARES, load_tokenizer("emoji")).plain(examples, "image_text")
    assert batch.second_view.shape == batch.frames.shape == (2, 1, 3, 64, 64)
    for row, example in enumerate(examples):
        np.testing.assert_array_equal(batch.second_view[row, 0].permute(1, 2, 0).numpy(), example.second_view[0])
    arrived = pack(batch, (), None).unpack()
    assert arrived.second_view is batch.second_view
    arrived.check()

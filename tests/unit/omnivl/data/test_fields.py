"""Fields of samples: types, what is wrong with them, their places in views, and the tensors of a batch."""

import io
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from omnivl.data.augment import evaluation_view
from omnivl.data.config import AugmentConfig, DataEntryConfig
from omnivl.data.decode import decode_still
from omnivl.data.example import Example, ExampleReader
from omnivl.data.field_tensors import collate_fields
from omnivl.data.fields import Field, FieldReader
from omnivl.data.limits import DecodeLimits
from omnivl.data.placement import Placement
from omnivl.data.sizes import InputSizes
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.text import sample_identity

SIZES = InputSizes(image_size=8, video_size=8, num_frames=2, patch_size=4, tubelet_size=1, text_length=6)
PLAIN = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)


class LengthTokenizer:
    """A text as its length."""

    special = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        return np.array([[1, 5 + len(text), 2, *[0] * (length - 3)] for text in texts], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("not needed")

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        everywhere = np.ones(self.special.vocab_size, dtype=np.bool_)
        return everywhere, everywhere


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def sample(members: dict[str, bytes] | None = None, **meta: object) -> Sample:
    picture = png(np.full((20, 40, 3), 90, np.uint8))
    return Sample("k", "s.tar:k", picture, "png", captions=("a cat",), meta=meta, members=members or {})


def entry(fields: object, kind: str = "image_text", **options: object) -> DataEntryConfig:
    return DataEntryConfig("s", kind, fields=fields, augment=PLAIN, **options)  # type: ignore[arg-type]


def read(field: Field, value: object) -> object:
    return FieldReader(entry({"f": "json"}), {"f": field}).read(sample(json=value))["f"]


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        (Field("text"), "yes", "yes"),
        (Field("text", most=3), ["yes", "no"], ("yes", "no")),
        (Field("text", most=3), "yes", ("yes",)),
        (Field("number"), 3, 3.0),
        (Field("number", most=2), [0.5, 1], (0.5, 1.0)),
        (Field("raw"), {"a": [1, None]}, {"a": [1, None]}),
        (Field("boxes"), [0, 0.5, 1, 1], [[0, 0.5, 1, 1]]),
        (Field("boxes", most=2), [[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1]], [[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1]]),
        (Field("boxes", most=2), [], []),
        (Field("text", required=False), None, None),
        # What converters write of regions, as texts and as boxes.
        (
            Field("text", most=2),
            [{"caption": "a cat", "box": [0, 0, 1, 1]}, {"attribute": "a red cat"}],
            ("a cat", "a red cat"),
        ),
        (Field("boxes", most=2), [{"caption": "a cat", "box": [0, 0, 0.5, 1]}], [[0, 0, 0.5, 1]]),
        (Field("boxes"), {"box": [0, 0.5, 1, 1]}, [[0, 0.5, 1, 1]]),
    ],
)
def test_values_of_every_type(field, value, wanted):
    found = read(field, value)
    assert (found.tolist() if isinstance(found, np.ndarray) else found) == wanted


@pytest.mark.parametrize(
    ("field", "value", "cause", "detail"),
    [
        (Field("text"), None, "missing_field", "nothing in 'json', which is wanted as 'f'"),
        (Field("text"), 3, "wrong_field", "'json' is 3; allowed: texts that are not empty"),
        (Field("text"), " ", "wrong_field", "'json' is ' '; allowed: texts that are not empty"),
        (Field("text"), ["a", "b"], "wrong_field", "2 values in 'json'; allowed: 1"),
        (Field("text", most=2), ["a", 1], "wrong_field", "'json' is ['a', 1]; allowed: texts"),
        (Field("number"), "3", "wrong_field", "'json' is '3'; allowed: finite numbers"),
        (Field("number"), True, "wrong_field", "'json' is True; allowed: finite numbers"),
        (Field("number"), float("nan"), "wrong_field", "'json' is nan; allowed: finite numbers"),
        (Field("number", most=2), [1, 2, 3], "wrong_field", "3 values in 'json'; allowed: at most 2"),
        (Field("boxes"), [10, 20, 30, 40], "wrong_field", "allowed: boxes [left, top, right, bottom] as fractions of"),
        (Field("boxes"), [], "wrong_field", "0 values in 'json'; allowed: 1"),
        (Field("boxes"), [0.5, 0, 0.5, 1], "wrong_field", "[left, top, right, bottom]"),
        (Field("boxes"), {"x": 1}, "wrong_field", "[left, top, right, bottom]"),
        (Field("boxes", most=2), [[0, 0, 1]], "wrong_field", "[left, top, right, bottom]"),
    ],
)
def test_bad_values_are_named(field, value, cause, detail):
    with pytest.raises(BadSampleError) as caught:
        read(field, value)
    assert (caught.value.rejection.cause, caught.value.rejection.where) == (cause, "s.tar:k")
    assert detail in caught.value.rejection.detail


def test_weights_are_as_many_as_answers():
    asked = {"answers": Field("text", most=10), "weights": Field("number", most=10, as_many_as="answers")}
    reader = FieldReader(entry(("answers", "weights")), asked)
    found = reader.read(sample(answers=["yes", "no"], weights=[0.75, 0.25]))
    assert found == {"answers": ("yes", "no"), "weights": (0.75, 0.25)}
    with pytest.raises(BadSampleError, match=r"wrong_field: 1 in 'weights', 2 in 'answers'; allowed: as many"):
        reader.read(sample(answers=["yes", "no"], weights=[1.0]))


def test_what_nobody_asks_for_is_kept_as_it_is():
    reader = FieldReader(entry(("question_id", "history", "captions")), {})
    found = reader.read(sample(question_id=7, history=[["hello?", "hi"]]))
    assert found == {"question_id": 7, "history": [["hello?", "hi"]], "captions": ["a cat"]}
    assert reader.read(sample())["history"] is None


def test_boxes_and_masks_follow_the_middle_of_a_wide_picture():
    mask = np.zeros((10, 20), np.uint8)  # half as large as the picture
    mask[:, 5:10] = 200
    asked = {"region": Field("boxes", most=3), "inside": Field("mask")}
    reader = FieldReader(entry({"region": "boxes", "inside": "mask.png"}), asked)
    boxes = [[0.25, 0.0, 0.5, 1.0], [0.0, 0.0, 0.25, 1.0]]
    found = reader.read(sample({"mask.png": png(mask)}, boxes=boxes))
    # columns 10 .. 29 of 40 are seen: the first box is their left half, the second one lies outside
    place = evaluation_view(np.zeros((1, 20, 40, 3), np.uint8), 8).place
    placed = reader.place(found, [place], 8)
    assert placed["region"].present.tolist() == [True, False]
    np.testing.assert_allclose(placed["region"].values, [[0, 0, 0.5, 1], [0, 0, 0, 0]])
    assert placed["inside"].present.tolist() == [True]
    assert placed["inside"].values[0, 3].tolist() == [True] * 4 + [False] * 4


def test_a_broken_mask_is_a_bad_sample():
    reader = FieldReader(entry({"inside": "mask.png"}), {})
    for data in (b"nothing", png(np.zeros((4, 4), np.uint8))[:-30]):
        with pytest.raises(BadSampleError, match=r"mask.png: no picture that can be decoded"):
            reader.read(sample({"mask.png": data}))
    assert reader.read(sample())["inside"] is None


def test_a_mask_has_the_limits_of_a_picture():
    reader = FieldReader(entry({"inside": "mask.png"}), {}, DecodeLimits(max_pixels=100))
    with pytest.raises(BadSampleError, match=r"mask.png: too_many_pixels: 11 x 10 pixels; allowed: 100 in all"):
        reader.read(sample({"mask.png": png(np.zeros((10, 11), np.uint8))}))
    huge = bytearray(png(np.zeros((4, 4), np.uint8)))
    huge[33:37] = b"\x7f\xff\xff\xff"  # a chunk of 2 GiB
    with pytest.raises(BadSampleError, match=r"mask.png: no picture that can be decoded"):
        reader.read(sample({"mask.png": bytes(huge)}))


def test_the_least_value_of_a_deep_mask_is_inside():
    reader = FieldReader(entry({"inside": "mask.png"}), {})
    for values in (np.array([[0, 1]], np.uint16), np.array([[[0, 0, 0], [1, 0, 0]]], np.uint8)):
        assert reader.read(sample({"mask.png": png(values)}))["inside"].tolist() == [[[False, True]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("tagged", [False, True])
def test_a_mask_is_turned_with_its_picture(orientation, tagged):
    """The mask of the white part of a photograph that lies on its side, in the layout of the sensor."""
    stored = np.zeros((10, 20), np.uint8)
    stored[:5, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = {}
    for name, options in (("picture", {"exif": exif.tobytes()}), ("mask", {"exif": exif.tobytes()} if tagged else {})):
        file = io.BytesIO()
        Image.fromarray(stored).save(file, "PNG", **options)
        files[name] = file.getvalue()
    one = replace(sample({"mask.png": files["mask"]}), media=files["picture"], extension="png")
    found = FieldReader(entry({"inside": "mask.png"}), {}).read(one)["inside"][0]
    assert np.array_equal(found, decode_still(one, DecodeLimits())[0, :, :, 0] > 127)
    if orientation >= 5:  # somebody has turned the mask already
        turned = replace(one, members={"mask.png": png(found.astype(np.uint8))})
        assert np.array_equal(FieldReader(entry({"inside": "mask.png"}), {}).read(turned)["inside"][0], found)


def test_tensors_of_a_batch():
    types = {
        "answers": Field("text", most=3, length=4),
        "weights": Field("number", most=3),
        "score": Field("number", required=False),
        "boxes": Field("boxes", most=2),
        "inside": Field("mask", required=False),
        "id": Field(),
    }
    reader = FieldReader(entry({**{name: name for name in types}, "inside": "mask.png"}), types)
    mask = np.ones((4, 4), np.uint8)
    samples = [
        sample(
            {"mask.png": png(mask)},
            **{"answers": ["no", "yes"], "weights": [0.75, 0.25], "score": 2, "boxes": [[0, 0, 1, 1]], "id": 5},
        ),
        sample(answers="maybe", weights=1, boxes=[], id="x"),
    ]
    places = [Placement()]
    found = collate_fields(types, [reader.place(reader.read(one), places, 2) for one in samples], LengthTokenizer(), 2)
    assert found["answers"] == (("no", "yes"), ("maybe",))
    assert found["answers/token_ids"].tolist() == [
        [[1, 7, 2, 0], [1, 8, 2, 0], [0] * 4],
        [[1, 10, 2, 0], [0] * 4, [0] * 4],
    ]
    assert found["answers/present"].tolist() == [[True, True, False], [True, False, False]]
    assert found["weights"].tolist() == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]
    assert (found["score"].tolist(), found["score/present"].tolist()) == ([2.0, 0.0], [True, False])
    assert found["boxes"].tolist() == [[[0, 0, 1, 1], [0] * 4], [[0] * 4] * 2]
    assert found["boxes/present"].tolist() == [[True, False], [False, False]]
    assert (found["inside"].shape, found["inside"].dtype) == ((2, 2, 2), torch.bool)
    assert found["inside"][0].all()
    assert found["inside/present"].tolist() == [True, False]
    assert found["id"] == (5, "x")
    assert {found[name].dtype for name in ("weights", "score", "boxes")} == {torch.float32}


def test_no_text_at_all_gives_padding():
    types = {"answers": Field("text", most=2, length=3, required=False)}
    found = collate_fields(types, [{"answers": None}] * 2, LengthTokenizer(), 2)
    assert found["answers/token_ids"].tolist() == [[[0] * 3] * 2] * 2
    assert found["answers"] == (None, None)


def finished(
    config: DataEntryConfig, what: Sample, asked: dict[str, Field] | None = None, *, training: bool = True
) -> Example:
    limits = DecodeLimits()
    reader = ExampleReader(config, None, SIZES, key="k", seed=0, limits=limits, training=training, asked=asked)
    return reader.finish(what, 3)


def test_half_a_surrogate_pair_is_a_bad_sample():
    config = entry(("answers",), text="question")
    for fields in ({"question": "what \ud83d", "answers": ["a"]}, {"question": "what", "answers": ["a\udc36"]}):
        with pytest.raises(
            BadSampleError, match=r"invalid_utf8: '\\ud[83c]+[d6]' at character \d of a text is no char"
        ):
            finished(config, sample(**fields))


def test_whatever_fails_for_a_sample_names_it(monkeypatch):
    def fail(*_: object) -> None:
        raise AttributeError("a decoder's own mistake")

    monkeypatch.setattr("omnivl.data.example.sample_identity", fail)
    with pytest.raises(BadSampleError, match="unusable: AttributeError: a decoder's own mistake") as caught:
        finished(entry(("answers",), text="question"), sample(question="what", answers=["a"]))
    assert caught.value.rejection.where == sample().where


def test_a_field_as_the_text():
    config = entry(("answers",), text="question")
    made = finished(config, sample(question=" what is it? ", answers=["a cat"]))
    assert (made.text, made.fields) == ("what is it?", {"answers": ["a cat"]})
    with pytest.raises(BadSampleError, match="missing_caption: kind image_text needs a text in 'question'"):
        finished(config, sample(answers=["a cat"]))
    with pytest.raises(BadSampleError, match="wrong_field: 'question' is 3; allowed: a text or a list of texts"):
        finished(config, sample(question=3))
    assert sample_identity(sample(question="A"), config) == sample_identity(sample(question="a "), config)


def test_texts_and_pictures_alone():
    said = finished(entry((), "text"), sample())
    assert (said.text, said.pictures) == ("a cat", None)
    shown = finished(entry((), "image"), sample())
    assert shown.text is None
    assert shown.pictures.shape == (1, 8, 8, 3)


def test_a_set_of_pictures():
    dark, light = (png(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200))
    config = entry((), "images_text", pictures=("left.png", "right.png"))
    made = finished(config, sample({"left.png": dark, "right.png": light}))
    assert made.pictures.shape == (2, 8, 8, 3)
    assert [int(picture.mean()) for picture in made.pictures] == [10, 200]
    lacking = entry((), "images_text", pictures=("left.png", "right.png"), least_pictures=1)
    assert [int(picture.mean()) for picture in finished(lacking, sample({"right.png": light})).pictures] == [0, 200]


def test_boxes_lie_in_the_picture_that_is_asked_for():
    wide, tall = png(np.zeros((20, 40, 3), np.uint8)), png(np.zeros((40, 20, 3), np.uint8))
    config = entry(("box",), "images_text", pictures=("left.png", "right.png"))
    what = sample({"left.png": wide, "right.png": tall}, box=[0.0, 0.25, 1.0, 0.5])
    boxes = [
        finished(config, what, {"box": Field("boxes", picture=picture)}, training=False).fields["box"].values[0]
        for picture in (0, 1)
    ]
    # the middle is seen: half the columns of the wide one, half the rows of the tall one
    np.testing.assert_allclose(boxes, [[0, 0.25, 1, 0.5], [0, 0, 1, 0.5]])


def test_a_direction_in_any_text_keeps_the_picture_from_being_mirrored():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 200
    config = DataEntryConfig(
        "s", "image_text", fields=("answers", "history"), augment=AugmentConfig((1, 1), (1, 1), flip=1.0)
    )

    def mirrored(**meta: object) -> bool:
        what = Sample("k", "s:k", png(pixels), "png", captions=("a cat",), meta=meta)
        made = finished(config, what)
        return bool(made.pictures[0, 0, 0, 0] == 0)

    assert mirrored(answers=["up"], history=[{"q": "where?"}])
    assert not mirrored(answers=["up", "on the left"])
    assert not mirrored(history=[{"q": "is it left of the dog?"}])

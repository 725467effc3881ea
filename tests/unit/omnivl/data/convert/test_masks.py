"""Masks from polygons and run lengths, checked by hand, and pickles that ask for more than plain values."""

import io
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnivl.data.convert.masks import mask_png
from omnivl.data.convert.pickles import load_pickle
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError
from omnivl.errors import DataError

SIZE = (6, 4)  # width, height


def drawn(value: object, size: tuple[int, int] = SIZE) -> np.ndarray:
    png = mask_png(Record(Path("instances.json"), ":annotations[3]", {"segmentation": value}), "segmentation", size)
    return np.asarray(Image.open(io.BytesIO(png)))


def letters(lengths: list[int]) -> str:
    """COCO's letters of run lengths: five bits each, lowest first, from the fourth on as differences."""
    text = ""
    for place, length in enumerate(lengths):
        number = length - lengths[place - 2] if place > 2 else length
        while True:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


def test_polygons_are_joined():
    expected = np.zeros((4, 6), np.uint8)
    expected[1:3, 1:4] = 255
    assert np.array_equal(drawn([[1, 1, 4, 1, 4, 3, 1, 3]]), expected)
    assert np.array_equal(drawn([[1, 1, 4, 1, 4, 3, 1, 3], [2, 1, 3, 1, 3, 2, 2, 2]]), expected), "no hole in two"
    expected[0, 5] = 255
    assert np.array_equal(drawn([[1, 1, 4, 1, 4, 3, 1, 3], [5, 0, 60, 0, 60, 1, 5, 1]]), expected), "cut at the border"


def test_the_area_of_a_polygon_is_that_of_its_mask():
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    flat = np.stack([100 + 70.3 * np.cos(angles), 90 + 50.7 * np.sin(angles)], axis=1).ravel().tolist()
    exact = 70.3 * 50.7 * 60 / 2 * np.sin(2 * np.pi / 60)
    found = (drawn([flat], (200, 180)) > 0).sum()
    assert found == pytest.approx(exact, rel=0.003)


@pytest.mark.parametrize("code", [list, letters])
def test_run_lengths_go_down_the_columns(code):
    lengths = [5, 2, 4, 1, 10, 2]  # five 0, then two 1 in the second column (rows 1 and 2), ...
    expected = np.zeros((4, 6), np.uint8)
    expected[1:3, 1] = 255
    expected[3, 2] = 255
    expected[2:, 5] = 255
    assert np.array_equal(drawn({"counts": code(lengths), "size": [4, 6]}), expected)


def test_letters_of_long_and_falling_runs():
    lengths = [0, 1000, 3, 40, 2000, 7, 1, 949]
    assert letters([0, 1000, 3, 40]) == "0Xo03PRO", "the codes that COCO's tools write"
    mask = drawn({"counts": letters(lengths), "size": [40, 100]}, (100, 40))
    assert (mask > 0).sum() == 1000 + 40 + 7 + 949


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (None, "segmentation is None; allowed: a list"),
        ([], "segmentation is []; allowed: a polygon or more"),
        ([[1, 1, 2, 2]], "[0] is [1, 1, 2, 2]; allowed: a polygon of three points or more, x and y of each"),
        ([[1, 1, 2, 2, 3, "x"]], "[0][5] is 'x'; allowed: a number"),
        ({"counts": [24], "size": [6, 4]}, "size is [6, 4]; allowed: height and width of the picture, 4 and 6"),
        ({"counts": [20], "size": [4, 6]}, "counts is [20]; allowed: lengths of runs, 24 in all"),
        ({"counts": [25, -1], "size": [4, 6]}, "counts is [25, -1]; allowed: lengths of runs, 24 in all"),
        ({"counts": "o", "size": [4, 6]}, "counts is 'o'; allowed: lengths of runs, 24 in all"),
        ({"counts": "é", "size": [4, 6]}, "counts is 'é'; allowed: lengths of runs, 24 in all"),
        ({"counts": [1e300], "size": [4, 6]}, "counts is [1e+300]; allowed: lengths of runs, 24 in all"),
    ],
)
def test_what_is_no_mask(value, detail):
    with pytest.raises(BadSampleError) as caught:
        drawn(value)
    assert (caught.value.rejection.cause, caught.value.rejection.detail) == ("wrong_field", detail)


@pytest.mark.parametrize(("size", "cause"), [((0, 4), "wrong_field"), ((100_000, 1000), "too_many_pixels")])
def test_sizes_that_no_picture_has(size, cause):
    with pytest.raises(BadSampleError) as caught:
        drawn([[0, 0, 1, 0, 1, 1]], size)
    assert caught.value.rejection.cause == cause


class Touches:
    """Writes a file when it is unpickled as usual."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(tmp_path, protocol):
    plain = [{"a": (1, 2.5, None, True), "b": ["x", "é", [1]], 3: 10**30}]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(plain, protocol))
    assert load_pickle(tmp_path / "refs.p") == plain


def test_texts_of_python_2_are_read(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"(dp0\nS'caf\\xc3\\xa9'\np1\nI5\ns.")
    assert load_pickle(tmp_path / "refs.p") == {"café": 5}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_is_run(tmp_path, protocol):
    made = tmp_path / "made"
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Touches(made)], protocol))
    with pytest.raises(DataError) as caught:
        load_pickle(tmp_path / "refs.p")
    asks = "STACK_GLOBAL" if protocol > 3 else "GLOBAL posix mknod"
    assert str(caught.value) == (
        f"{tmp_path}/refs.p: no pickle of plain values: it has an instruction that is not followed, {asks}; "
        "allowed: lists, dictionaries, texts and numbers; save it again from a program that you trust, without other "
        "objects"
    )
    assert not made.exists()
    pickle.loads((tmp_path / "refs.p").read_bytes())
    assert made.exists(), "the pickle does run something where it may"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_damaged_pickle_is_read_or_refused(tmp_path, protocol):
    content = pickle.dumps([{"a": (1, 2.5, None, True, (1,), ()), "b": ["x", "é", [1]], 3: 10**30, "c": {}}], protocol)
    draw = random.Random(protocol)
    read = 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        (tmp_path / "refs.p").write_bytes(changed)
        try:
            load_pickle(tmp_path / "refs.p")
            read += 1
        except DataError:
            pass
    assert 0 < read < 300


def test_a_pickle_nested_without_end_is_refused(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"}(" + b")" + b"\x85" * 200_000 + b"K\x01u.")
    with pytest.raises(DataError, match="no pickle of plain values: a key is a tuple; allowed: "):
        load_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("value", [OrderedDict(a=1), np.float64(1), np.zeros(2), Path("x"), print, os.system, dict.get])
def test_other_objects_are_refused(tmp_path, value):
    (tmp_path / "refs.p").write_bytes(pickle.dumps(value))
    with pytest.raises(
        DataError, match=r"no pickle of plain values: it has an instruction that is not followed, (STACK_)?GLOBAL"
    ):
        load_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x80\x04", b"\x80\x02]q", b"\x82\x01.", b"cos\nsystem\n(S'true'\ntR."]
)
def test_what_is_no_pickle(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(DataError, match=r"refs\.p: no pickle of plain values: "):
        load_pickle(tmp_path / "refs.p")
    with pytest.raises(DataError, match="No such file or directory; give the path of a readable file"):
        load_pickle(tmp_path / "none.p")

"""Shards, splits, scaling, atomicity and messages of the loop that converters share."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import av
import media_files
import numpy as np
import pytest
from PIL import Image

from omnivl.data.convert import ConvertOptions, FolderReader, TableReader, convert
from omnivl.data.convert.entry import sample_key
from omnivl.data.convert.media import shown_size, shrink
from omnivl.data.convert.run import draw_split
from omnivl.data.formats import MEDIA_EXTENSIONS
from omnivl.errors import DataError


@pytest.fixture
def pictures(tmp_path, make_image) -> Path:
    root = tmp_path / "in"
    for number in range(5):
        make_image(root / "cat" / f"{number}.png", seed=number)
    return root


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_input_gives_same_bytes(pictures, tmp_path):
    options = ConvertOptions(max_samples=2, splits={"test": 0.4})
    first = convert(FolderReader(pictures), tmp_path / "a", options)
    for path in pictures.rglob("*.png"):
        path.touch()
    convert(FolderReader(pictures), tmp_path / "b", options)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    for shard in first.shards:
        data = (tmp_path / "a" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_shards_are_cut_by_samples_and_by_bytes(pictures, tmp_path):
    by_samples = convert(FolderReader(pictures), tmp_path / "a", ConvertOptions(max_samples=2))
    assert [(shard.name, shard.samples) for shard in by_samples.shards] == [
        ("data-000000.tar", 2),
        ("data-000001.tar", 2),
        ("data-000002.tar", 1),
    ]
    by_bytes = convert(FolderReader(pictures), tmp_path / "b", ConvertOptions(max_bytes=1))
    assert [shard.samples for shard in by_bytes.shards] == [1] * 5


def test_manifest(pictures, tmp_path):
    convert(FolderReader(pictures), tmp_path / "out", ConvertOptions())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["format"], manifest["form"], manifest["samples"]) == ("omnivl-shards", "folder", 5)
    assert manifest["labels"] == {"cat": 5}
    assert manifest["rejected"] == {}
    assert str(tmp_path) not in json.dumps(manifest)


def test_the_size_of_a_video_is_written_where_the_sample_has_none(tmp_path, make_video):
    given: list[dict[str, object]] = [{}, {"width": 7, "height": "low"}, {"width": 7}]
    for number in range(len(given)):
        make_video(tmp_path / f"{number}.mp4", 96, 64)
    table = tmp_path / "list.jsonl"
    table.write_text("\n".join(json.dumps({"path": f"{n}.mp4", "c": "x", **own}) for n, own in enumerate(given)))
    reader = TableReader(table, caption_columns=("c",), keep=("width", "height"))
    convert(reader, tmp_path / "out", ConvertOptions())
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        texts = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    found = [(text["width"], text["height"]) for text in sorted(texts, key=lambda text: text["file"])]
    assert found == [(96, 64), (7, "low"), (7, 64)]


def test_shown_size_is_upright_and_none_for_what_does_not_decode():
    width, height = media_files.SIDES
    assert shown_size(media_files.clip(), "w") == (width, height)
    assert shown_size(media_files.clip(turn=(90, False)), "w") == (height, width)
    assert shown_size(media_files.clip()[:200], "w") is None


def test_split_follows_the_name_and_keeps_concepts_together(pictures, tmp_path, make_image):
    shares = {"test": 0.25, "validation": 0.25}
    drawn = [draw_split(f"name {number}", shares) for number in range(4000)]
    assert [drawn.count(split) / 4000 for split in ("test", "validation", "train")] == pytest.approx(
        [0.25, 0.25, 0.5], abs=0.03
    )
    assert draw_split("x", {}) is None
    table = tmp_path / "list.jsonl"
    rows = [{"path": f"in/cat/{number}.png", "c": "x", "who": "same"} for number in range(5)]
    table.write_text("\n".join(map(json.dumps, rows)))
    reader = TableReader(table, caption_columns=("c",), identity_column="who")
    manifest = convert(reader, tmp_path / "out", ConvertOptions(splits=shares))
    assert dict(manifest.splits) == {draw_split("same", shares): 5}


def test_shorter_side(tmp_path, make_image, make_video):
    root = tmp_path / "in"
    small = make_image(root / "x" / "small.png", 20, 16)
    make_image(root / "x" / "wide.jpg", 64, 32)
    Image.new("RGBA", (32, 64), (255, 0, 0, 128)).save(root / "x" / "clear.png")
    make_video(root / "x" / "clip.mp4", 96, 64)
    frames = [Image.new("RGB", (40, 40), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(root / "x" / "anim.webp", save_all=True, append_images=frames[1:], duration=70)
    turned = Image.new("RGB", (64, 32))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn: it is shown 32 wide and 64 high
    turned.save(root / "x" / "turned.jpg", exif=exif)
    convert(FolderReader(root), tmp_path / "out", ConvertOptions(shorter_side=16))
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        media = {
            Path(member.name).name: tar.extractfile(member).read()
            for member in tar.getmembers()
            if not member.name.endswith("json")
        }
    assert set(media) == {"small.png", "wide.jpg", "clear.png", "clip.mp4", "anim.webp", "turned.jpg"}
    assert media["small.png"] == small
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in media.items() if name != "clip.mp4"}
    assert sizes == {
        "small.png": (20, 16),
        "wide.jpg": (32, 16),
        "clear.png": (16, 32),
        "anim.webp": (16, 16),
        "turned.jpg": (16, 32),
    }
    assert Image.open(io.BytesIO(media["clear.png"])).getpixel((0, 0)) == (255, 0, 0, 128)
    assert Image.open(io.BytesIO(media["anim.webp"])).n_frames == 2
    with av.open(io.BytesIO(media["clip.mp4"])) as clip:
        decoded = list(clip.decode(video=0))
    assert len(decoded) == 4
    assert (decoded[0].width, decoded[0].height) == (24, 16)


@pytest.mark.parametrize("verify", ["header", "full"])
def test_broken_files_are_rejected(pictures, tmp_path, make_image, make_video, verify):
    good = make_image(pictures / "cat" / "good.png")
    (pictures / "cat" / "cut.png").write_bytes(good[:-20])
    (pictures / "cat" / "text.jpg").write_text("no picture")
    (pictures / "cat" / "text.mp4").write_text("no clip")
    (pictures / "cat" / "no_extension").write_text("x")
    jpeg = make_image(pictures / "cat" / "z.jpg", 64, 64)
    (pictures / "cat" / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (pictures / "cat" / "unreadable.png").symlink_to("nowhere")
    manifest = convert(FolderReader(pictures), tmp_path / "out", ConvertOptions(verify=verify))
    expected = {"broken_image": 2, "broken_video": 1, "unknown_extension": 1, "missing_media": 1}
    if verify == "full":  # only decoding tells that a JPEG is cut
        expected["broken_image"] = 3
    assert dict(manifest.rejected) == expected


def test_names_that_would_fall_together(tmp_path, make_image):
    root = tmp_path / "in"
    for name in ("a.png", "a.jpg", "b.c.png", "b_c.png", "犬.png", "猫.png", f"{'long' * 40}.png"):
        make_image(root / "x" / name)
    manifest = convert(FolderReader(root), tmp_path / "out", ConvertOptions())
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        keys = {name.partition(".")[0] for name in tar.getnames()}
    assert manifest.samples == 7
    assert len(keys) == 7
    assert sample_key("x/plain-1_2.png") == "x/plain-1_2"
    assert sample_key("../x/a.png").startswith("_/x/a-")
    assert sample_key("v1.0/a") != sample_key("v1")


def test_a_failure_leaves_nothing_behind(pictures, tmp_path):
    def stop(manifest: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(FolderReader(pictures), tmp_path / "out", ConvertOptions(), progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_output_folder_rules(pictures, tmp_path):
    out = tmp_path / "out"
    reader = FolderReader(pictures)
    convert(reader, out, ConvertOptions())
    with pytest.raises(DataError) as caught:
        convert(reader, out, ConvertOptions())
    assert str(caught.value) == (
        f"the output folder {out} is not empty; choose another one, or replace it with --overwrite"
    )
    convert(reader, out, ConvertOptions(max_samples=1, overwrite=True))
    assert len(list(out.glob("*.tar"))) == 5
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"holds no manifest\.json of an earlier conversion"):
        convert(reader, foreign, ConvertOptions(overwrite=True))
    assert (foreign / "thesis.txt").read_text() == "precious"
    for overlapping in (pictures, pictures / "cat" / "out", tmp_path):
        with pytest.raises(DataError, match="overlap; choose another output folder"):
            convert(reader, overlapping, ConvertOptions(overwrite=True))
    (tmp_path / "empty").mkdir()
    convert(reader, tmp_path / "empty", ConvertOptions())


def test_nothing_usable_says_why(tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    with pytest.raises(DataError) as empty:
        convert(FolderReader(tmp_path / "in"), tmp_path / "out", ConvertOptions())
    assert str(empty.value) == (
        f"{tmp_path / 'in'}: no picture or clip found; known extensions: {', '.join(sorted(MEDIA_EXTENSIONS))}"
    )
    (tmp_path / "in" / "x" / "a.doc").write_text("x")
    with pytest.raises(DataError) as bad:
        convert(FolderReader(tmp_path / "in"), tmp_path / "out", ConvertOptions())
    assert str(bad.value).startswith(f"{tmp_path / 'in'}: no usable sample (1 unknown_extension); first ones:\n  ")
    with pytest.raises(DataError, match="does not exist; give the path of the input"):
        convert(FolderReader(tmp_path / "none"), tmp_path / "out", ConvertOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ConvertOptions(max_samples=0), "max_samples is 0; allowed: 1 or more"),
        (ConvertOptions(shorter_side=4), "shorter_side is 4; allowed: 8 pixels or more"),
        (
            ConvertOptions(splits={"a": 0.5, "b": 0.5}),
            "splits are a=0.5, b=0.5; allowed: shares above 0 with a sum below 1, the rest is train",
        ),
        (
            ConvertOptions(splits={"train": 0.5}),
            "splits name train; it is what remains: name the others only, e.g. test=0.1",
        ),
    ],
)
def test_options_are_checked(pictures, tmp_path, options, message):
    with pytest.raises(DataError) as caught:
        convert(FolderReader(pictures), tmp_path / "out", options)
    assert str(caught.value) == message


def test_names_and_texts_that_are_no_text(tmp_path, make_image):
    make_image(tmp_path / "a.png")
    name = b"caf\xe9.png"
    (tmp_path / os.fsdecode(name)).write_bytes((tmp_path / "a.png").read_bytes())
    table = tmp_path / "list.jsonl"
    rows = [
        {"path": "a.png", "text": "good"},
        {"path": "a.png\0.png", "text": "null byte"},
        {"path": "./a.png/b.png", "text": "no folder"},
        {"path": "b\ud800.png", "text": "half a character"},
        {"path": os.fsdecode(name), "text": "latin-1"},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    manifest = convert(TableReader(table, caption_columns=("text",)), tmp_path / "out", ConvertOptions())
    assert manifest.samples == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["cause"], line["where"].rpartition(":")[2]) for line in lines] == [
        ("unreadable_path", "2"),
        ("unreadable_path", "3"),
        ("unreadable_path", "4"),
        ("invalid_utf8", "5"),
    ]


def test_split_names(tmp_path, make_image):
    table = tmp_path / "list.csv"
    reader = TableReader(table, caption_columns=("text",), split_column="fold")
    for number in range(17):
        make_image(tmp_path / f"{number}.png")
    table.write_text("path,text,fold\n0.png,x,te/st\n")
    with pytest.raises(DataError) as caught:
        convert(reader, tmp_path / "out", ConvertOptions())
    assert str(caught.value) == (
        f"{table}:2: split 'te/st' cannot be part of a file name; allowed: letters, digits, '-' and '_'"
    )
    table.write_text("path,text,fold\n" + "".join(f"{number}.png,x,s{number}\n" for number in range(17)))
    with pytest.raises(DataError) as caught:
        convert(reader, tmp_path / "out", ConvertOptions())
    assert str(caught.value) == (
        f"{table}:18: more than 16 different splits, the last is 's16'; name the column that says train, test ... "
        "as the split column, or none"
    )


def test_lists_that_cannot_be_used(tmp_path):
    table = tmp_path / "list.csv"

    def message(reader: TableReader) -> str:
        with pytest.raises(DataError) as caught:
            list(reader.entries())
        return str(caught.value)

    table.write_text("path,captoin\na.png,x\n")
    assert message(TableReader(table, caption_columns=("caption",))) == (
        f"{table}:1: no column 'caption'; the columns are 'path', 'captoin'; did you mean 'captoin'?"
    )
    assert message(TableReader(table)) == (
        f"{table}: no caption or label column is named; name one (--caption, --label, --keep)"
    )
    table.write_text("")
    assert message(TableReader(table, label_column="x")) == (
        f"{table}: the file is empty; write a header line with the names of the columns"
    )
    other = tmp_path / "list.json"
    other.write_text('[\n{"a": 1,}]')
    assert message(TableReader(other, label_column="x")).startswith(f"{other}:2: no JSON: ")
    other.write_text("{}")
    assert message(TableReader(other, label_column="x")) == (
        f"{other}: the file holds a dict; allowed: a list of objects (COCO captions have their own form)"
    )
    assert message(TableReader(tmp_path / "list.xlsx", label_column="x")) == (
        f"{tmp_path / 'list.xlsx'}: lists of the form '.xlsx' are not read; "
        "allowed: .csv, .tsv, .json, .jsonl, .ndjson, .parquet"
    )


def test_scaling_keeps_depth_kind_and_rotation():
    grey = io.BytesIO()
    Image.fromarray(np.full((40, 60), 20_000, dtype=np.uint16)).save(grey, "PNG")
    data, extension = shrink(grey.getvalue(), "png", 16, "a")
    assert (extension, np.asarray(Image.open(io.BytesIO(data)))[5, 5]) == ("png", 20_000)
    shades = [Image.new("RGB", (40, 40), (shade, 0, 0)) for shade in (0, 255)]
    for form, extension in (("MPO", "jpg"), ("PNG", "png")):  # a second picture inside does not make a photograph move
        out = io.BytesIO()
        shades[0].save(out, form, save_all=True, append_images=shades[1:])
        data, extension = shrink(out.getvalue(), extension, 16, "a")
        assert (extension, Image.open(io.BytesIO(data)).size) == ("jpg", (16, 16))
    clip = io.BytesIO()
    with av.open(clip, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    data, _ = shrink(clip.getvalue(), "mp4", 16, "a")
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
    assert (frame.width, frame.height, frame.rotation) == (32, 16, 90)

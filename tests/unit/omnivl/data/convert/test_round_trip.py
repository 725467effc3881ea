"""Each converter: convert, read with the training's own source, compare texts and bytes."""

import json
from pathlib import Path

import pytest

from omnivl.data.batch import DataKind
from omnivl.data.config import DataEntryConfig
from omnivl.data.convert import (
    CocoReader,
    ConvertOptions,
    FolderReader,
    KineticsReader,
    SSv2Reader,
    TableReader,
    convert,
)
from omnivl.data.convert.folder import FolderText
from omnivl.data.sources import open_source
from omnivl.data.sources.base import Sample

OPTIONS = ConvertOptions()


def read_all(folder: Path, kind: DataKind, **where: tuple[str, ...]) -> dict[str, Sample]:
    source = open_source(DataEntryConfig(source=str(folder), kind=kind, where=where), seed=0)
    samples = [source.read(index) for index in range(len(source))]
    assert not source.rejections
    return {sample.key: sample for sample in samples}


def rejected(folder: Path) -> list[tuple[str, str, str]]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return [(entry["cause"], entry["where"], entry["detail"]) for entry in map(json.loads, lines)]


def test_folder_of_classes(tmp_path, make_image, make_video):
    root, out = tmp_path / "in", tmp_path / "out"
    cat = make_image(root / "cat" / "a.png")
    dog = make_image(root / "dog" / "deep" / "b.c.jpg")
    run = make_video(root / "dog" / "run.mp4")
    (root / "dog" / "notes.doc").write_text("x")
    make_image(root / "top.png")
    (root / ".hidden").write_text("x")
    reader = FolderReader(root)
    manifest = convert(reader, out, OPTIONS)

    images = read_all(out, "image_label")
    assert {sample.label: sample.media for sample in images.values()} == {"cat": cat, "dog": dog}
    assert images["cat/a"].extension == "png"
    assert images["cat/a"].meta["file"] == "cat/a.png"
    (clip,) = read_all(out, "video_label").values()
    assert (clip.key, clip.media, clip.label) == ("dog/run", run, "dog")
    assert manifest.samples == 3
    assert dict(manifest.kinds) == {"image": 2, "video": 1}
    assert dict(manifest.labels) == {"cat": 1, "dog": 2}
    causes = {(cause, Path(where).name) for cause, where, _ in rejected(out)}
    assert causes == {("unknown_extension", "notes.doc"), ("missing_label", "top.png")}
    assert reader.count() == 4


def test_folder_with_sidecar_captions(tmp_path, make_image):
    root, out = tmp_path / "in", tmp_path / "out"
    media = make_image(root / "sub" / "a.png")
    (root / "sub" / "a.txt").write_text("a cat\n\n  two cats \n", encoding="utf-8")
    make_image(root / "b.png")
    make_image(root / "c.png")
    (root / "c.txt").write_bytes(b"caf\xe9")
    (root / "lonely.txt").write_text("x")
    convert(FolderReader(root, text="caption"), out, OPTIONS)
    (sample,) = read_all(out, "image_text").values()
    assert (sample.captions, sample.label, sample.media) == (("a cat", "two cats"), None, media)
    causes = {(cause, Path(where).name) for cause, where, _ in rejected(out)}
    assert causes == {("missing_caption", "b.png"), ("invalid_utf8", "c.txt"), ("missing_media", "lonely.txt")}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_within_a_caption_end_no_line(tmp_path, end):
    (tmp_path / "a.png").write_bytes(b"")
    lines = ["one\u2028line", "two\x85words", "three\x0b\x0c\x1c\x1d\x1emarks\u2029"]
    (tmp_path / "a.txt").write_bytes(end.join([*lines, "", ""]).encode())
    (entry,) = FolderReader(tmp_path, text="caption").entries()
    assert entry.captions == ("one\u2028line", "two\x85words", "three\x0b\x0c\x1c\x1d\x1emarks")


@pytest.mark.parametrize(("text", "caption"), [("label", ()), ("both", ("hello",))])
def test_folder_with_splits(tmp_path, make_image, text: FolderText, caption):
    root, out = tmp_path / "in", tmp_path / "out"
    make_image(root / "train" / "cat" / "a.png", seed=1)
    held_out = make_image(root / "val" / "cat" / "a.png", seed=2)
    if text == "both":
        (root / "val" / "cat" / "a.txt").write_text("hello")
    manifest = convert(FolderReader(root, text, split_folders=True), out, OPTIONS)
    assert [shard.name for shard in manifest.shards] == ["train-000000.tar", "val-000000.tar"]
    (sample,) = read_all(out, "image_label", split=("val",)).values()
    assert (sample.media, sample.captions, sample.label) == (held_out, caption, "cat")


def test_csv_joins_neighbouring_rows(tmp_path, make_image):
    first, second = make_image(tmp_path / "pics" / "1.png"), make_image(tmp_path / "pics" / "2.png", seed=1)
    table, out = tmp_path / "list.csv", tmp_path / "out"
    table.write_text(
        "file,text,class,concept,fold,licence\n"
        'pics/1.png,"one, first",cat,felis,train,CC0\n'
        "pics/1.png,one again,cat,felis,train,CC0\n"
        "pics/2.png,zwölf,,,test,\n"
        "pics/1.png,late,cat,felis,train,CC0\n"
        "pics/3.png,not there,cat,,train,\n"
        ",no file,cat,,train,\n"
        "pics/2.png,a,b,c,d,e,f\n",
        encoding="utf-8",
    )
    reader = TableReader(
        table,
        path_column="file",
        caption_columns=("text",),
        label_column="class",
        identity_column="concept",
        split_column="fold",
        keep=("licence",),
    )
    convert(reader, out, OPTIONS)
    samples = read_all(out, "image_text")
    one, two = samples["pics/1"], samples["pics/2"]
    assert (one.captions, one.label, one.identity) == (("one, first", "one again"), "cat", "felis")
    assert (one.meta["licence"], one.meta["split"]) == ("CC0", "train")
    assert (two.captions, two.label, two.identity) == (("zwölf",), None, None)
    assert "licence" not in two.meta
    assert (one.media, two.media) == (first, second)
    found = [(cause, where.removeprefix(f"{table}:")) for cause, where, _ in rejected(out)]
    assert sorted(found) == [
        ("duplicate_key", "5"),
        ("missing_media", "6"),
        ("missing_media", "7"),
        ("wrong_json", "8"),
    ]


def test_rows_with_two_pictures_a_mask_and_boxes(tmp_path, make_image):
    left, right = make_image(tmp_path / "a.png", 20, 10), make_image(tmp_path / "b.png", seed=1)
    inside = make_image(tmp_path / "m.png", 40, 20, seed=2)
    table, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    rows = [
        {"a": "a.png", "b": "b.png", "m": "m.png", "text": "same?", "box": [5, 2, 10, 4], "answer": {"yes": 1.0}},
        {"a": "a.png", "b": "b.png", "text": "again?", "box": [[0, 0, 100, 5], [15, 5, 5, 5]], "answer": {"no": 1.0}},
        {"a": "a.png", "b": "b.png", "text": "outside", "box": [30, 2, 10, 4]},
        {"a": "a.png", "b": "b.png", "text": "odd", "box": "here"},
        {"a": "gone.png", "b": "b.png", "text": "gone"},
    ]
    table.write_text("\n".join(json.dumps(row) for row in rows))
    reader = TableReader(
        table,
        path_column=None,
        caption_columns=("text",),
        keep=("answer",),
        pictures={"left": "a", "right": "b"},
        masks={"inside": "m"},
        boxes={"box": "xywh"},
    )
    manifest = convert(reader, out, ConvertOptions(shorter_side=8))
    assert (manifest.samples, manifest.kinds) == (2, {"image": 4})
    entry = DataEntryConfig(
        str(out), "images_text", pictures=("left", "right"), fields={"box": "box", "inside": "inside.png"}
    )
    source = open_source(entry, seed=0)
    first, second = source.read(0), source.read(1)
    assert (first.captions, first.meta["answer"]) == (("same?",), {"yes": 1.0})
    assert first.meta["box"] == [0.25, 0.2, 0.75, 0.6], "of 20 x 10, whatever it was scaled to"
    assert second.meta["box"] == [[0.0, 0.0, 1.0, 0.5], [0.75, 0.5, 1.0, 1.0]]
    assert list(first.members) == ["left.jpg", "right.jpg", "inside.png"]
    assert first.members["inside.png"] == inside, "a mask is never scaled"
    assert first.members["left.jpg"] not in (left, right)
    assert list(second.members) == ["left.jpg", "right.jpg"]
    found = [(cause, where.removeprefix(f"{table}:")) for cause, where, _ in rejected(out)]
    assert found == [("wrong_field", "3"), ("wrong_field", "4"), ("missing_media", "5")]


def test_questions_on_one_picture_are_samples_of_their_own(tmp_path, make_image):
    make_image(tmp_path / "pics" / "1.png", 20, 10)
    table, out = tmp_path / "vqa.csv", tmp_path / "out"
    table.write_text('path,question,bbox\npics/1.png,what?,"[0, 0, 10, 10]"\npics/1.png,where?,\n')
    convert(TableReader(table, keep=("question",), boxes={"bbox": "xyxy"}, row_is_sample=True), out, OPTIONS)
    samples = read_all(out, "image")
    assert {key: sample.meta["question"] for key, sample in samples.items()} == {
        "pics/1-2": "what?",
        "pics/1-3": "where?",
    }
    assert samples["pics/1-2"].meta["bbox"] == [0.0, 0.0, 0.5, 1.0]
    assert "bbox" not in samples["pics/1-3"].meta


def test_rows_without_any_file(tmp_path):
    table, out = tmp_path / "glosses.json", tmp_path / "out"
    table.write_text(json.dumps([{"gloss": "a small dog"}, {"gloss": "a large cat", "box": [0, 0, 1, 1]}]))
    reader = TableReader(table, path_column=None, caption_columns=("gloss",), boxes={"box": "xyxy"})
    convert(reader, out, OPTIONS)
    assert {key: sample.captions for key, sample in read_all(out, "text").items()} == {"row-0": ("a small dog",)}
    assert rejected(out) == [("missing_media", f"{table}[1]", "no picture for the boxes in 'box'")]


def test_csv_with_bytes_that_are_not_utf8(tmp_path, make_image):
    make_image(tmp_path / "a.png")
    table = tmp_path / "list.tsv"
    table.write_bytes(b"path\tcaption\na.png\tcaf\xe9\na.png\tgood\n")
    convert(TableReader(table, caption_columns=("caption",)), tmp_path / "out", OPTIONS)
    (sample,) = read_all(tmp_path / "out", "image_text").values()
    assert sample.captions == ("good",)
    assert rejected(tmp_path / "out") == [
        ("invalid_utf8", f"{table}:2", "the row is not UTF-8; save the file as UTF-8"),
    ]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_json_lists(tmp_path, make_image, make_video, form):
    picture, clip = make_image(tmp_path / "a.webp"), make_video(tmp_path / "b.mp4")
    rows = [
        {"path": "a.webp", "captions": ["one", " two "], "alt": "three", "score": 0.5},
        {"path": "b.mp4", "captions": "runs"},
        {"path": "a.webp", "captions": {"en": "x"}},
        ["no object"],
    ]
    table = tmp_path / f"list.{form}"
    text = json.dumps(rows) if form == "json" else "\n".join([*map(json.dumps, rows), "{broken"])
    table.write_text(text)
    convert(TableReader(table, caption_columns=("captions", "alt"), keep=("score",)), tmp_path / "out", OPTIONS)
    (image,) = read_all(tmp_path / "out", "image_text").values()
    (video,) = read_all(tmp_path / "out", "video_text").values()
    assert (image.captions, image.media, image.meta["score"]) == (("one", "two", "three"), picture, 0.5)
    assert (video.captions, video.media) == (("runs",), clip)
    places = [where.removeprefix(str(table)) for _, where, _ in rejected(tmp_path / "out")]
    assert places == (["[2]", "[3]"] if form == "json" else [":3", ":4", ":5"])


def test_coco_captions(tmp_path, make_image):
    media = make_image(tmp_path / "val2017" / "000000000139.jpg")
    make_image(tmp_path / "val2017" / "silent.jpg")
    annotations = tmp_path / "captions_val2017.json"
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}, {"id": 7, "file_name": "silent.jpg"}],
        "annotations": [
            {"image_id": 139, "id": 1, "caption": "A room. "},
            {"image_id": 139, "id": 2, "caption": "A table."},
            {"image_id": 99, "id": 3, "caption": "Of nothing."},
            {"image_id": 139, "id": 4, "caption": " "},
        ],
    }
    annotations.write_text(json.dumps(content))
    convert(CocoReader(annotations, tmp_path / "val2017", split="val"), tmp_path / "out", OPTIONS)
    (sample,) = read_all(tmp_path / "out", "image_text").values()
    assert (sample.captions, sample.media) == (("A room.", "A table."), media)
    assert (sample.meta["image_id"], sample.meta["split"]) == (139, "val")
    found = [(cause, where.removeprefix(f"{annotations}:")) for cause, where, _ in rejected(tmp_path / "out")]
    assert found == [
        ("missing_caption", "annotations[3]"),
        ("missing_caption", "images[1]"),
        ("missing_media", "annotations[2]"),
    ]


def test_coco_with_sentences_inside(tmp_path, make_image):
    media = make_image(tmp_path / "val2014" / "x.jpg")
    image = {"filepath": "val2014", "filename": "x.jpg", "cocoid": 5, "split": "restval", "sentences": [{"raw": "Hi."}]}
    annotations = tmp_path / "dataset_coco.json"
    annotations.write_text(json.dumps({"images": [image], "dataset": "coco"}))
    manifest = convert(CocoReader(annotations, tmp_path), tmp_path / "out", OPTIONS)
    (sample,) = read_all(tmp_path / "out", "image_text").values()
    assert (sample.captions, sample.media, sample.key) == (("Hi.",), media, "val2014/x")
    assert manifest.shards[0].split == "restval"


def test_kinetics(tmp_path, make_video):
    clips, table = tmp_path / "clips", tmp_path / "validate.csv"
    cut = make_video(clips / "abseiling" / "_4YTwq0-73Y_000044_000054.mp4")
    whole = make_video(clips / "0wR5jVB-WPk.webm", frames=3)
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "abseiling,_4YTwq0-73Y,44,54,validate\n"
        "zumba,0wR5jVB-WPk,417,427,validate\n"
        "zumba,missing0000,1,11,validate\n"
        "zumba,0wR5jVB-WPk,x,11,validate\n"
    )
    reader = KineticsReader(table, clips)
    convert(reader, tmp_path / "out", OPTIONS)
    by_label = {sample.label: sample for sample in read_all(tmp_path / "out", "video_label").values()}
    assert by_label["abseiling"].media == cut
    assert by_label["zumba"].media == whole
    assert by_label["zumba"].extension == "webm"
    assert by_label["abseiling"].meta["time_start"] == 44.0
    assert by_label["abseiling"].meta["split"] == "validate"
    found = [(cause, where) for cause, where, _ in rejected(tmp_path / "out")]
    assert found == [("missing_media", f"{table}:4"), ("missing_media", f"{table}:5")]
    assert reader.count() == 4


def test_something_something(tmp_path, make_video):
    media = make_video(tmp_path / "clips" / "78687.webm")
    entries, labels = tmp_path / "something-something-v2-validation.json", tmp_path / "labels.json"
    template = "Holding [something] next to [something]"
    rows = [
        {
            "id": "78687",
            "label": "holding potato next to vase",
            "template": template,
            "placeholders": ["potato", "vase"],
        },
        {"id": "1", "label": "holding a next to b", "template": template},
        {"id": "2", "label": "holding x", "template": "Holding [somethin] next to [something]"},
    ]
    entries.write_text(json.dumps(rows))
    labels.write_text(json.dumps({"Holding something next to something": "0"}))
    convert(SSv2Reader(entries, tmp_path / "clips", labels), tmp_path / "out", OPTIONS)
    for kind in ("video_label", "video_text"):
        (sample,) = read_all(tmp_path / "out", kind).values()
        assert (sample.label, sample.captions) == (
            "Holding something next to something",
            ("holding potato next to vase",),
        )
        assert (sample.media, sample.meta["split"]) == (media, "validation")
        assert sample.meta["placeholders"] == ["potato", "vase"]
    causes = [cause for cause, _, _ in rejected(tmp_path / "out")]
    assert causes == ["missing_media", "missing_label"]
    assert "did you mean 'Holding something next to something'?" in rejected(tmp_path / "out")[1][2]

"""The commands of ``omnivl data``, run in this process."""

import json
import os
from pathlib import Path

import pytest
from icon_package import write_package
from PIL import Image
from tar_files import write_tar
from typer.testing import CliRunner

from launcher.commands.data import app
from launcher.commands.data_convert import parse_splits
from omnivl.data.emoji import build
from omnivl.errors import DataError, UserError

runner = CliRunner()


def run(*words: str | Path) -> str:
    result = runner.invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def pictures(tmp_path) -> Path:
    for number in range(6):
        path = tmp_path / "in" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    (tmp_path / "in" / "cat" / "bad.png").write_bytes(b"x")
    return tmp_path / "in"


def test_convert_then_inspect(pictures, tmp_path):
    out = tmp_path / "out"
    shown = run("convert", "folder", pictures, "--out", out, "--text", "both", "--samples-per-shard", "4")
    assert "6 samples (6 images) in 2 shards" in shown
    assert "broken image" in shown
    counts = json.loads(run("inspect", out, "--html", tmp_path / "page.html", "--samples", "3", "--json"))
    assert counts["kinds"] == {"image_text": 6, "image_label": 6, "image": 6, "text": 6}
    assert counts["labels"] == {"cat": 3, "dog": 3}
    assert (tmp_path / "page.html").read_text().count('<figure class="card">') == 3
    table = run("inspect", out)
    assert "6 samples in 2 shards" in table
    assert "Labels: cat 3, dog 3" in table


def test_every_form_has_its_command(pictures, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("file,text,fold\nin/dog/0.png,hello,a\nin/cat/1.png,there,b\n")
    words = ("--path", "file", "--caption", "text", "--split-column", "fold", "--json")
    manifest = json.loads(run("convert", "table", table, "--out", tmp_path / "1", *words))
    assert manifest["splits"] == {"a": 1, "b": 1}

    coco = tmp_path / "captions.json"
    image = {"id": 1, "file_name": "dog/0.png"}
    coco.write_text(json.dumps({"images": [image], "annotations": [{"image_id": 1, "caption": "x"}]}))
    manifest = json.loads(
        run("convert", "coco", coco, pictures, "--out", tmp_path / "2", "--split-name", "v", "--json")
    )
    assert (manifest["form"], manifest["splits"]) == ("coco", {"v": 1})

    clips = tmp_path / "clips"
    clips.mkdir()
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 200)]
    for name in ("abc", "12"):
        frames[0].save(clips / f"{name}.gif", save_all=True, append_images=frames[1:])
    kinetics = tmp_path / "k.csv"
    kinetics.write_text("label,youtube_id,time_start,time_end,split\nrun,abc,0,10,train\n")
    manifest = json.loads(run("convert", "kinetics", kinetics, clips, "--out", tmp_path / "3", "--json"))
    assert (manifest["kinds"], manifest["labels"]) == ({"video": 1}, {"run": 1})

    something = tmp_path / "train.json"
    something.write_text(json.dumps([{"id": "12", "label": "holding cup", "template": "Holding [something]"}]))
    labels = tmp_path / "labels.json"
    labels.write_text('{"Holding something": "0"}')
    words = ("--labels", labels, "--json")
    manifest = json.loads(run("convert", "ssv2", something, clips, "--out", tmp_path / "4", *words))
    assert (manifest["captions"], manifest["labels"]) == (1, {"Holding something": 1})


def test_options_reach_the_conversion(pictures, tmp_path):
    words = ("--split", "test=0.5", "--shorter-side", "8", "--check", "full", "--json")
    manifest = json.loads(run("convert", "folder", pictures, "--out", tmp_path / "out", "--text", "both", *words))
    assert set(manifest["splits"]) == {"test", "train"}
    assert (manifest["options"]["shorter_side"], manifest["options"]["verify"]) == (8, "full")
    with pytest.raises(DataError, match="replace it with --overwrite"):
        run("convert", "folder", pictures, "--out", tmp_path / "out")
    run("convert", "folder", pictures, "--out", tmp_path / "out", "--text", "both", "--overwrite")


def test_messages(tmp_path):
    for texts, message in (
        (["test"], "--split test: allowed: NAME=SHARE, e.g. --split test=0.1"),
        (["=0.1"], "--split =0.1: the name is missing"),
        (["a=0.1", "a=0.2"], "--split a=0.2: the name is there twice"),
    ):
        with pytest.raises(DataError) as caught:
            parse_splits(texts)
        assert str(caught.value) == message
    assert parse_splits(["test=0.1", "val=0.2"]) == {"test": 0.1, "val": 0.2}
    missing = tmp_path / "none"
    with pytest.raises(DataError) as caught:
        run("convert", "folder", missing, "--out", tmp_path / "out")
    assert str(caught.value) == f"{missing} does not exist; give the path of the input"
    with pytest.raises(DataError) as caught:
        run("inspect", "emoji", "--html", missing / "page.html")
    assert str(caught.value) == (
        f"--html {missing / 'page.html'}: the folder {missing} does not exist; make it or name another one"
    )


def test_build_emoji_passes_its_options_on(tmp_path, monkeypatch):
    asked: dict[str, object] = {}

    def build_emoji(out: Path, packages: Path | None, full: bool, progress: build.Progress) -> build.BuildReport:
        asked.update(out=out, packages=packages, full=full)
        progress("drawings", 1, 2)
        return build.BuildReport(out, (), 5, {"noto": 4}, 3, {"train": 7}, 11)

    monkeypatch.setattr(build, "build_emoji", build_emoji)
    counts = json.loads(run("build", "emoji", "--out", tmp_path, "--packages", tmp_path / "p", "--full", "--json"))
    assert asked == {"out": tmp_path, "packages": tmp_path / "p", "full": True}
    assert counts == {
        "concepts": 5,
        "clips": 3,
        "drawings": {"noto": 4},
        "splits": {"train": 7},
        "vocabulary": 11,
        "shards": 0,
    }
    assert "noto 4" in run("build", "emoji", "--out", tmp_path)


def test_what_is_no_shard_ends_with_an_error(pictures, tmp_path):
    """The counts of the others are printed before."""
    run("convert", "folder", pictures, "--out", tmp_path / "out")
    (tmp_path / "out" / "notes.tar").write_text("no archive " * 100)
    result = runner.invoke(app, ["inspect", str(tmp_path / "out"), "--json"])
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(
        f"{tmp_path}/out: 1 of 2 files are no shards; the first: {tmp_path}/out/notes.tar: this is no tar archive: "
    )
    assert json.loads(result.stdout)["samples"] == 6


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b\x08" + bytes(600), bytes(10240)])
def test_a_single_file_that_is_no_shard(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    result = runner.invoke(app, ["inspect", str(tmp_path / "x.tar")])
    assert isinstance(result.exception, DataError)


def test_a_cut_shard_is_still_inspected(pictures, tmp_path):
    run("convert", "folder", pictures, "--out", tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:5000])
    counts = json.loads(run("inspect", shard, "--json"))
    assert counts["samples"] > 0
    assert counts["rejected"] == {"truncated_tar": 1}
    assert counts["no_shards"] == []


@pytest.mark.parametrize("name", [b"\xff\xfe [1].tar", b"{a,b}\xe9.tar", b"x\x1b[31m.tar"], ids=repr)
def test_inspect_takes_and_shows_shards_of_any_name(name, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    write_tar(path, {"a.png": b"no picture", "a.txt": b"said", "b.json": b"{"})
    page = tmp_path / "page.html"
    counts = json.loads(run("inspect", path, "--html", page, "--json"))
    assert counts["samples"] == 1
    assert counts["rejected"] == {"wrong_json": 1, "broken_image": 1}
    assert {Path(one["where"].rpartition(":")[0]) for one in counts["rejections"]} == {path}
    assert "\x1b" not in run("inspect", path)
    assert b"\x1b" not in page.read_bytes()


def test_build_icons_from_an_archive(tmp_path):
    archive = write_package(tmp_path / "icons.tgz")
    words = ("build", "icons", "--out", tmp_path / "o", "--packages", archive, "--processes", "1")
    report = json.loads(run(*words, "--licences", "share-alike", "--json"))
    assert report["icons"] == 9
    assert report["counts"]["license"]["CC-BY-SA-4.0"] == 1
    assert report["left_out"]["openmoji"] == "kept for checks from outside"
    shown = run(*words, "--licences", "share-alike")
    assert "seen 6, unseen 3" in shown
    assert "blank 1, damaged 2, outside_reference 1, undrawable 1" in " ".join(shown.split())
    with pytest.raises(DataError) as caught:
        run(*words, "--licences", "any")
    assert str(caught.value) == "--licences any: allowed: free, share-alike, non-free, unclear"


def test_overlap_of_a_test_set_with_training_data(pictures, tmp_path):
    for name, folder in (("train", pictures), ("test", pictures / "cat")):
        run("convert", "folder", folder, "--out", tmp_path / name, "--text", "caption")
    out, page = tmp_path / "pairs.jsonl", tmp_path / "page.html"
    words = ("overlap", tmp_path / "train", "--test", tmp_path / "test", "--out", out, "--min-words", "2")
    counts = json.loads(run(*words, "--html", page, "--json"))
    assert (counts["training_samples"], counts["test_samples"], counts["threshold"]) == (6, 3, 0.9)
    assert counts["test_pictures_found_as_the_same_file"] == counts["test_samples_with_a_text_found"] == 3
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["picture", "text"] * 3
    assert page.read_text().count('<div class="pair">') == 6
    assert "test samples with both" in run(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", "0"), "--threshold: got 0.0; allowed: above 0 and at most 1; change it"),
        (("--media", "sound"), "--media: got 'sound'"),
        (("--test-where", "[x]"), "allowed is a mapping"),
    ],
)
def test_what_an_overlap_refuses(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run("overlap", "emoji", "--test", "emoji", "--out", tmp_path / "pairs.jsonl", *words)


def test_the_values_of_a_field_become_a_list(pictures, tmp_path):
    run("convert", "folder", pictures, "--out", tmp_path / "out")
    shown = run("values", tmp_path / "out", "--field", "label", "--out", tmp_path / "lists" / "labels.txt")
    assert "2 of 2 values, 100.0% of all:" in shown.replace("\n", "")
    assert (tmp_path / "lists" / "labels.txt").read_text() == "cat\ndog\n"
    with pytest.raises(
        DataError, match=r"--least: got 9, and the most frequent value stands there 3 times; allowed is"
    ):
        run("values", tmp_path / "out", "--field", "label", "--least", "9", "--out", tmp_path / "none.txt")
    assert not (tmp_path / "none.txt").exists()

"""The build of a small package: samples, what is left out and why, equal bytes, interruption."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icon_package import write_package
from PIL import Image

from omnivl.data.config import DataEntryConfig
from omnivl.data.emoji.packages import Package
from omnivl.data.emoji.shards import ShardSample, read_shard
from omnivl.data.icons import build as build_module
from omnivl.data.icons import package as package_module
from omnivl.data.icons.build import IconOptions, IconReport, build_icons
from omnivl.data.icons.job import PARTS
from omnivl.data.sources.shards import ShardSource
from omnivl.errors import DataError


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("npm") / "icons.tgz")


def files(folder: Path) -> dict[str, bytes]:
    """The files of a build; the loader may have put indexes beside them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".index" not in path.name}


def samples(folder: Path) -> dict[str, ShardSample]:
    return {sample.key: sample for shard in sorted(folder.glob("*.tar")) for sample in read_shard(shard)}


def refused(folder: Path) -> dict[str, str]:
    lines = (folder / "refused.jsonl").read_text().splitlines()
    return {line["where"]: line["cause"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def built(package: Path, tmp_path_factory: pytest.TempPathFactory) -> IconReport:
    return build_icons(tmp_path_factory.mktemp("built") / "icons", package, processes=1)


def test_samples_are_the_listed_icons_of_free_sets(built: IconReport) -> None:
    assert set(samples(built.out)) == {
        "alpha_cottage",
        "alpha_cottage-outline",
        "alpha_arrow-left",
        "alpha_arrow-right",
        "beta_ball",
        "beta_ghost",
        "twemoji_star",
        "twemoji_circle",
    }
    assert built.icons == 8
    assert built.counts["license"] == {"CC-BY-4.0": 4, "MIT": 4}
    assert sum(path.stat().st_size for path in built.out.glob("*.tar")) == built.bytes


def test_what_is_not_drawn_is_named_and_ends_nothing(built: IconReport) -> None:
    assert refused(built.out) == {
        "alpha:flat": "damaged",
        "alpha:leak": "outside_reference",
        "alpha:nothing": "blank",
        "alpha:torn": "undrawable",
        "broken": "damaged",
    }
    assert built.refused == {"blank": 1, "damaged": 2, "outside_reference": 1, "undrawable": 1}


def test_sets_are_left_out_by_licence_and_openmoji_always(built: IconReport, package: Path, tmp_path: Path) -> None:
    kept = {"openmoji": "kept for checks from outside", "copies": "kept for checks from outside"}
    assert built.left_out == kept | {
        "shared": "licence is share-alike: CC-BY-SA-4.0",
        "mystery": "licence is unclear: Ask us",
    }
    everything = build_icons(
        tmp_path, package, IconOptions(groups=("free", "share-alike", "non-free", "unclear")), processes=1
    )
    assert everything.left_out == kept
    assert everything.icons == 10
    with pytest.raises(DataError) as caught:
        build_icons(tmp_path / "o", package, IconOptions(sets=("openmoji",)))
    assert str(caught.value) == (
        "set 'openmoji' is left out: kept for checks from outside; name other sets or further licences"
    )


def test_the_fields_of_a_sample(built: IconReport) -> None:
    fields: dict[str, Any] = dict(samples(built.out)["alpha_cottage"].fields)
    assert (fields["identity"], fields["name"], fields["label"]) == ("cottage", "cottage", "Buildings")
    assert fields["tags"] == ["villa", "Buildings", "Places"]
    assert fields["captions"] == ["cottage", "cottage, villa, Buildings, Places", "cottage, Alpha Icons"]
    assert (fields["set"], fields["author"], fields["license"]) == ("alpha", "Ann", "MIT")
    assert fields["colours"] == "seeded"
    outline = samples(built.out)["alpha_cottage-outline"].fields
    assert (outline["identity"], outline["name"]) == ("cottage", "cottage outline")
    assert "label" not in outline
    assert samples(built.out)["beta_ball"].fields["group"] == "Emoji"


def test_pictures_are_96_px_and_colours_are_those_of_the_fields(built: IconReport) -> None:
    for sample in samples(built.out).values():
        with Image.open(io.BytesIO(sample.media)) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (96, 96, 3)
        ground = tuple(bytes.fromhex(str(sample.fields["ground"])[1:]))
        assert tuple(pixels[0, 0]) == ground, sample.key
    with Image.open(io.BytesIO(samples(built.out)["alpha_cottage"].media)) as picture:
        colour = tuple(bytes.fromhex(str(samples(built.out)["alpha_cottage"].fields["colour"])[1:]))
        assert picture.getpixel((48, 60)) == colour
    assert samples(built.out)["beta_ball"].fields["ground"] == "#ffffff"
    assert samples(built.out)["beta_ghost"].fields["ground"] != "#ffffff", "white on white cannot be seen"


def test_twemoji_is_an_unseen_hand_and_so_is_a_copy_of_it(built: IconReport) -> None:
    hands = {key: sample.fields["hand"] for key, sample in samples(built.out).items()}
    assert hands["twemoji_star"] == hands["twemoji_circle"] == "unseen"
    assert hands["beta_ball"] == "unseen", "the same drawing as twemoji's circle"
    assert hands["beta_ghost"] == hands["alpha_cottage"] == "seen"


def test_a_plan_chooses_by_hand_split_set_and_share(built: IconReport) -> None:
    def count(**where: Any) -> int:
        entry = DataEntryConfig(source=str(built.out), kind="image_text", where=where)
        return len(ShardSource(entry, tuple(str(path) for path in sorted(built.out.glob("*.tar")))))

    assert count(hand=("unseen",)) == 3
    assert count(set=("alpha", "beta")) == 6
    assert count(colours=("seeded",)) == 4
    shares = sorted(float(str(sample.fields["share"])) for sample in samples(built.out).values())
    assert count(share=(f"< {shares[3]}",)) == 3


def test_the_notice_names_author_and_licence(built: IconReport) -> None:
    notice = (built.out / "NOTICE").read_text()
    assert "alpha: Alpha Icons, 4 icons. By Ann (https://a.example). Licence: MIT\n" in notice
    assert "openmoji" not in notice


def test_equal_options_give_equal_bytes_with_any_number_of_processes(
    built: IconReport, package: Path, tmp_path: Path
) -> None:
    again = build_icons(tmp_path / "2", package, processes=2)
    assert files(again.out) == files(built.out)
    other = samples(build_icons(tmp_path / "3", package, IconOptions(seed=1, sets=("alpha",)), processes=1).out)
    mine = samples(built.out)["alpha_cottage"].fields
    assert other["alpha_cottage"].fields["colour"] != mine["colour"]
    assert other["alpha_cottage"].fields["split"] == mine["split"], "splits are no matter of the seed"


def test_an_interrupted_build_goes_on(
    built: IconReport, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "icons" and done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        build_icons(tmp_path / "i", package, processes=1, progress=stop)
    assert not (tmp_path / "i" / "manifest.json").exists()
    first = next((tmp_path / "i").glob("*.tar"))
    written = first.stat().st_mtime_ns
    with pytest.raises(DataError, match="built with other seed; choose another folder"):
        build_icons(tmp_path / "i", package, IconOptions(seed=3))
    build_icons(tmp_path / "i", package, processes=1)
    assert first.stat().st_mtime_ns == written, "a finished shard is kept"
    assert not (tmp_path / "i" / PARTS).exists()
    assert files(tmp_path / "i") == files(built.out)
    monkeypatch.setattr(build_module, "read_infos", None)  # a complete build is not begun again
    assert build_icons(tmp_path / "i", package).icons == built.icons


def test_messages(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "text.tgz").write_text("no archive")
    empty = tmp_path / "empty"
    empty.mkdir()
    none = {"x": ({"name": "X", "license": {"spdx": "MIT"}}, {"icons": {"a": {"body": "<g/>"}}})}
    blank = write_package(tmp_path / "blank.tgz", none)
    for out, archive, options, message in (
        ("full", package, IconOptions(), "full is not empty and holds no icons; choose another one"),
        ("text.tgz", package, IconOptions(), "text.tgz is a file; give a folder"),
        ("o", tmp_path / "none.tgz", IconOptions(), "none.tgz does not exist; name the archive, its folder, or leave"),
        ("o", tmp_path / "text.tgz", IconOptions(), "name an archive of @iconify/json"),
        (
            "p",
            empty,
            IconOptions(),
            "no iconify-json-2.2.535.tgz; fetch it there with 'npm pack @iconify/json@2.2.535'",
        ),
        ("q", package, IconOptions(sets=("gamma",)), "no set 'gamma'; it has 8, such as alpha, beta, broken"),
        ("r", blank, IconOptions(), "no icon could be drawn; the first: x:a: nothing of it can be seen"),
    ):
        with pytest.raises(DataError) as caught:
            build_icons(tmp_path / out, archive, options, processes=1)
        assert message in str(caught.value)
    monkeypatch.setattr(package_module, "ICONS", Package("@iconify/json", "2.2.535", "0" * 64))
    (empty / "iconify-json-2.2.535.tgz").write_bytes(b"other")
    with pytest.raises(DataError, match="expected 0000"):
        build_icons(tmp_path / "s", empty)
    monkeypatch.setattr(build_module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="resvg-py is not installed"):
        build_icons(tmp_path / "s", empty)

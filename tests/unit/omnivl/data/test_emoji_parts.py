"""The steps of the builder on small inputs."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnivl.data.emoji import packages
from omnivl.data.emoji.captions import captions_of
from omnivl.data.emoji.clips import Clip, encode_clip, frame_positions, read_animation
from omnivl.data.emoji.join import Concept, family_of, has_skin_tone, normalise
from omnivl.data.emoji.render import draw, encode_drawing, on_white
from omnivl.data.emoji.shards import ShardSample, read_shard, write_shard
from omnivl.data.emoji.split import split_families
from omnivl.data.emoji.vocabulary import SPECIAL_TOKENS, train_vocabulary
from omnivl.errors import DataError


def test_code_points_are_normalised() -> None:
    assert normalise("1F9D4-1F3FB-200D-2642-FE0F") == "1f9d4-1f3fb-200d-2642"
    assert normalise("0023-fe0f-20e3") == "23-20e3"


@pytest.mark.parametrize(
    ("hexcode", "family"),
    [
        ("1f9d4-200d-2642", "1f9d4"),  # man: beard
        ("1f9d4-1f3fb-200d-2640", "1f9d4"),  # woman: light skin tone, beard
        ("1f468-200d-1f692", "1f9d1-200d-1f692"),  # man firefighter
        ("1f469", "1f9d1"),  # woman
        ("1f478", "1fac5"),  # princess
        ("1f469-200d-2764-200d-1f48b-200d-1f468", "1f48f"),  # kiss: woman, man
        ("1f468-200d-1f469-200d-1f467", "1f9d1-200d-1f9d1-200d-1f9d2"),  # family: man, woman, girl
        ("1f436", "1f436"),
    ],
)
def test_gender_variants_and_tones_share_a_family(hexcode: str, family: str) -> None:
    assert family_of(hexcode) == family


def test_skin_tone_is_seen() -> None:
    assert has_skin_tone("1f44b-1f3ff")
    assert not has_skin_tone("1f44b")


def concepts(subgroup: str, count: int, family_size: int = 1) -> list[Concept]:
    return [
        Concept(
            f"{subgroup}{i}", f"{subgroup} {i}", (), "g", subgroup, f"{subgroup}{i}", f"{subgroup}{i // family_size}"
        )
        for i in range(count)
    ]


def test_a_tenth_of_each_subgroup_is_held_out_twice() -> None:
    splits = split_families([*concepts("a", 20), *concepts("b", 30)])
    for subgroup, held_out in (("a", 2), ("b", 3)):
        values = [split for family, split in splits.items() if family.startswith(subgroup)]
        assert values.count("test") == values.count("val") == held_out


def test_small_subgroups_are_trained_on() -> None:
    assert set(split_families(concepts("a", 7)).values()) == {"train"}


def test_large_families_stay_whole_and_one_is_held_out() -> None:
    splits = split_families(concepts("a", 12, family_size=3))  # quota 1, families of 3
    assert sorted(splits.values()) == ["test", "train", "train", "val"]


def test_split_of_a_subgroup_does_not_depend_on_the_others() -> None:
    alone = split_families(concepts("b", 30))
    together = split_families([*concepts("a", 20), *concepts("b", 30)])
    assert alone.items() <= together.items()


def test_captions_begin_with_the_name_and_hold_each_tag() -> None:
    captions = captions_of("1f431", "cat face", ["cat", "Cat Face", "pet"])
    assert captions[:2] == ["cat face", "cat face, cat, pet"]  # the tag that repeats the name is left out
    assert all("cat face" in caption for caption in captions)
    assert len(set(captions)) == len(captions)
    assert captions_of("x", "thing", []) == ["thing"]


def test_vocabulary_by_hand() -> None:
    # aab x3, ab x1: pairs a-##a 3, ##a-##b 3, a-##b 1. Of equal counts ("##a", "##b") comes before ("a", "##a").
    vocabulary = train_vocabulary(["aab aab aab ab"], 10_000)
    assert tuple(vocabulary[:6]) == SPECIAL_TOKENS
    assert vocabulary[-3:] == ["##ab", "aab", "ab"]
    assert "z" in vocabulary
    assert "##z" in vocabulary


def test_vocabulary_keeps_to_its_size_and_to_lower_case() -> None:
    vocabulary = train_vocabulary(["The quick brown fox, the lazy dog"], 120)
    assert len(vocabulary) == 120
    assert not any(token.lower() != token for token in vocabulary[6:])


def test_drawings_are_padded_not_bent() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(buffer, "PNG")
    picture = draw(buffer.getvalue(), 20)
    alpha = np.asarray(picture)[:, :, 3]
    assert picture.size == (20, 20)
    assert alpha[:5].max() == 0
    assert alpha[5:15].min() == 255
    assert on_white(picture)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("style", ["fluent", "twemoji"])
def test_drawing_survives_its_encoding(style: str) -> None:
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[8:24, 8:24] = (200, 40, 40, 255)
    data = encode_drawing(Image.fromarray(pixels), style)
    assert data == encode_drawing(Image.fromarray(pixels), style)
    with Image.open(io.BytesIO(data)) as decoded:
        again = np.asarray(decoded.convert("RGBA")).astype(int)
    assert np.abs(again[10:22, 10:22] - [200, 40, 40, 255]).max() < 12
    assert again[:4, :, 3].max() == 0


def test_frame_positions_are_the_middles() -> None:
    assert frame_positions(72, 8) == [4, 13, 22, 31, 40, 49, 58, 67]
    assert frame_positions(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert frame_positions(5, 5) == [0, 1, 2, 3, 4]


def test_clips_are_deterministic_and_keep_frames_and_duration() -> None:
    import av

    frames = np.stack([np.full((96, 96, 3), 20 * i, dtype=np.uint8) for i in range(8)])
    data = encode_clip(Clip(frames, 800))
    assert len({encode_clip(Clip(frames, 800)) for _ in range(4)}) == 1
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.duration == pytest.approx(800_000, abs=1000)
    assert len(decoded) == 8
    assert max(abs(int(picture.mean()) - 20 * i) for i, picture in enumerate(decoded)) <= 3


def test_animations_are_told_from_stills() -> None:
    still, moving = io.BytesIO(), io.BytesIO()
    pictures = [Image.new("RGBA", (16, 16), (80 * i, 0, 0, 255)) for i in range(3)]
    pictures[0].save(still, "WEBP")
    pictures[0].save(moving, "WEBP", save_all=True, append_images=pictures[1:], duration=50, lossless=True)
    assert read_animation(still.getvalue(), 16, 8) is None
    clip = read_animation(moving.getvalue(), 16, None)
    assert clip is not None
    assert clip.frames.shape == (3, 16, 16, 3)
    assert clip.duration_ms == 150
    assert clip.frames[:, 8, 8, 0].tolist() == [0, 80, 160]


def test_shards_have_equal_bytes_and_no_names_of_people(tmp_path: Path) -> None:
    samples = [ShardSample("a_fluent", "webp", b"123", {"name": "é"}), ShardSample("a_clip", "mp4", b"45", {})]
    first, second = write_shard(tmp_path / "a.tar.gz", samples), write_shard(tmp_path / "b.tar.gz", samples)
    assert first.sha256 == second.sha256
    assert list(read_shard(tmp_path / "a.tar.gz")) == samples
    plain = write_shard(tmp_path / "a.tar", samples)
    assert plain.tar_sha256 == first.tar_sha256 == plain.sha256
    assert gzip.decompress((tmp_path / "a.tar.gz").read_bytes()) == (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == ["a_fluent.webp", "a_fluent.json", "a_clip.mp4", "a_clip.json"]
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}


def test_missing_and_changed_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no lobehub-fluent-emoji-3d-1\.1\.0\.tgz; fetch it there with 'npm pack @lobehub"
    ):
        packages.fetch_packages(tmp_path, tmp_path, lambda *_: None)
    (tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz").write_bytes(b"other")
    with pytest.raises(
        DataError, match="sha256 is d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa, expected"
    ):
        packages.fetch_packages(tmp_path, tmp_path, lambda *_: None)


def test_without_npm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(DataError, match="npm is not installed"):
        packages.fetch_packages(None, tmp_path, lambda *_: None)

"""The set that the package carries: hashes, counts, splits, texts; and that it can be built again."""

import hashlib
import io
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnivl.data.config import DataEntryConfig
from omnivl.data.emoji import unpack
from omnivl.data.emoji.build import build_emoji, encoder_versions
from omnivl.data.emoji.packages import HANDS, PACKAGES, STYLES, archive_name
from omnivl.data.emoji.render import on_white
from omnivl.data.emoji.shards import ShardSample, read_shard
from omnivl.data.sources.emoji import open_emoji
from omnivl.data.sources.motion_poses import MOTION_CLASSES
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError
from omnivl.tasks.pixel_baseline import pixel_features

LARGEST_BYTES = 17 * 10**6
HAND_COUNTS = {"noto_v1": 1190, "emojione_v2": 1054, "fluent_flat": 1562, "fxemoji": 230, "streamline": 356}
PACKAGE_FOLDER = "OMNIVL_EMOJI_PACKAGES"


@pytest.fixture(scope="module")
def samples() -> list[ShardSample]:
    manifest = unpack.read_manifest()
    return [sample for shard in manifest["shards"] for sample in read_shard(unpack.EMBEDDED / shard["name"])]


def test_files_are_those_of_the_manifest_and_small() -> None:
    manifest = unpack.read_manifest()
    for shard in manifest["shards"]:
        data = (unpack.EMBEDDED / shard["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert len(data) == shard["bytes"]
    vocabulary = unpack.VOCABULARY.read_bytes()
    assert hashlib.sha256(vocabulary).hexdigest() == manifest["vocabulary_sha256"]
    files = {path.name for path in unpack.EMBEDDED.iterdir()}
    assert files == {shard["name"] for shard in manifest["shards"]} | {"manifest.json", "vocab.txt", "NOTICE"}
    assert sum(path.stat().st_size for path in unpack.EMBEDDED.iterdir()) <= LARGEST_BYTES


def test_counts(samples: list[ShardSample]) -> None:
    drawings = Counter(sample.fields["style"] for sample in samples if sample.fields["medium"] == "drawing")
    clips = [sample for sample in samples if sample.fields["medium"] == "clip"]
    assert drawings == dict.fromkeys(STYLES, 1599) | HAND_COUNTS
    assert set(HAND_COUNTS) == set(HANDS)
    assert len(clips) == 728
    assert {sample.extension for sample in clips} == {"mp4"}
    names = {sample.fields["identity"]: sample.fields["name"] for sample in samples}
    assert len(names) == len(set(names.values())) == 1599
    labels = Counter(sample.fields["label"] for sample in samples if sample.key.endswith("_fluent"))
    assert len(labels) == 95
    assert sum(count >= 8 for count in labels.values()) == 67
    clip_labels = Counter(sample.fields["label"] for sample in clips)
    assert sum(count >= 8 for count in clip_labels.values()) == 28


def test_splits_are_by_concept_family_and_subgroup(samples: list[ShardSample]) -> None:
    by_family = defaultdict(set)
    by_label = defaultdict(set)
    concepts: dict[object, object] = {}
    for sample in samples:
        by_family[sample.fields["family"]].add(sample.fields["split"])
        by_label[sample.fields["label"]].add(sample.fields["split"])
        concepts[sample.fields["identity"]] = sample.fields["split"]
    assert all(len(splits) == 1 for splits in by_family.values())
    shares = Counter(concepts.values())
    assert shares["train"] / 1599 == pytest.approx(0.8, abs=0.03)
    assert shares["val"] / 1599 == pytest.approx(0.1, abs=0.02)
    assert shares["test"] / 1599 == pytest.approx(0.1, abs=0.02)
    assert all("train" in splits for splits in by_label.values())
    large = Counter(sample.fields["label"] for sample in samples if sample.key.endswith("_fluent"))
    assert all(by_label[label] == {"train", "val", "test"} for label, count in large.items() if count >= 8)


def test_no_embedded_text_is_unknown(samples: list[ShardSample]) -> None:
    tokenizer = load_tokenizer("emoji")
    texts = {"a picture of", "a photo of", *MOTION_CLASSES}
    for sample in samples:
        assert isinstance(sample.fields["captions"], list)
        texts |= {str(caption) for caption in sample.fields["captions"]}
        texts |= {f"the {sample.fields['name']} moves", str(sample.fields["label"]), str(sample.fields["group"])}
    ids = tokenizer.encode(sorted(texts), 96)
    unknown = unpack.VOCABULARY.read_text(encoding="utf-8").splitlines().index("[UNK]")
    assert not (ids == unknown).any()
    assert (ids[:, -1] == tokenizer.special.pad).all(), "no text was cut"


def test_all_pictures_have_the_same_size_and_transparency(samples: list[ShardSample]) -> None:
    for sample in samples[::50]:
        if sample.extension == "webp":
            with Image.open(io.BytesIO(sample.media)) as picture:
                assert picture.size == (96, 96)


def test_pixel_baseline_on_unseen_style(samples: list[ShardSample]) -> None:
    """Twemoji against 3D, 16 x 16 pixels on white; DATA.md's 0.210 / 0.435 / 0.305 were taken on black."""
    stills: dict[str, list[np.ndarray]] = {"twemoji": [], "fluent": []}
    labels = []
    for sample in samples:
        style = str(sample.fields["style"])
        if sample.extension == "webp" and style in stills:
            with Image.open(io.BytesIO(sample.media)) as picture:
                stills[style].append(on_white(picture.convert("RGBA")))
            labels += [sample.fields["label"]] if style == "fluent" else []
    features = {
        style: pixel_features(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, None])
        for style, pictures in stills.items()
    }
    distance = torch.cdist(features["twemoji"], features["fluent"])
    rank = (distance < distance.diagonal()[:, None]).sum(dim=1)
    nearest = distance.argmin(dim=1).tolist()
    assert float((rank < 1).double().mean()) == pytest.approx(0.216, abs=0.003)
    assert float((rank < 10).double().mean()) == pytest.approx(0.453, abs=0.003)
    assert np.mean([labels[j] == label for j, label in zip(nearest, labels, strict=True)]) == pytest.approx(
        0.309, abs=0.003
    )


def test_unpacks_once_and_mends_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIVL_CACHE", str(tmp_path))
    unpack.embedded_shards.cache_clear()
    first = unpack.embedded_shards()
    assert all(path.is_relative_to(tmp_path) for path in first)
    changed = first[0].stat().st_mtime_ns
    unpack.embedded_shards.cache_clear()
    assert unpack.embedded_shards() == first
    assert first[0].stat().st_mtime_ns == changed, "a good file is not written again"
    first[0].write_bytes(b"torn")
    unpack.embedded_shards.cache_clear()
    digest = unpack.read_manifest()["shards"][0]["tar_sha256"]
    assert hashlib.sha256(unpack.embedded_shards()[0].read_bytes()).hexdigest() == digest
    assert not [path for path in first[0].parent.iterdir() if path.suffix != ".tar"], "no rest of a write is left"
    unpack.embedded_shards.cache_clear()


def test_missing_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing; reinstall the package"):
        unpack.read_manifest(tmp_path)


def test_plans_filter_by_style_and_split() -> None:
    seen = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where={"style": ("fluent", "noto")}))
    assert len(seen) == 2 * 1599
    unseen = open_emoji(DataEntryConfig(source="emoji", kind="image_label", where={"split": ("test",)}))
    train = open_emoji(DataEntryConfig(source="emoji", kind="image_label", where={"split": ("train", "val")}))
    assert len(unseen) + len(train) == 3 * 1599 + sum(HAND_COUNTS.values())
    assert set(unseen.classes) <= set(train.classes)


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_second_build_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = os.environ.get(PACKAGE_FOLDER)
    if folder is None or not all((Path(folder) / archive_name(name)).is_file() for name in PACKAGES):
        pytest.skip(f"needs the npm archives in a folder that {PACKAGE_FOLDER} names")
    embedded = unpack.read_manifest()
    if encoder_versions() != embedded["encoders"]:
        pytest.skip(f"needs the encoders {embedded['encoders']}, these are {encoder_versions()}")
    build_emoji(tmp_path, Path(folder))
    for path in unpack.EMBEDDED.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name

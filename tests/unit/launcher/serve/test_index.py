"""The index of a gallery is built once for its shards and weights, and is never somebody else's."""

from pathlib import Path

import numpy as np
import pytest
from colour_gallery import NAMES, colours_shard, picture, png
from colour_model import ColourModel
from tar_files import write_tar

from launcher.serve import index as index_module
from launcher.serve.gallery import UNSEEN, Gallery, open_gallery
from launcher.serve.index import Index, open_index, weights_hash
from launcher.serve.nearest import Exact, Faiss, has_faiss
from omnivl.data import signed_file
from omnivl.errors import DataError, UserError


def opened(source: Path | str, **options: object) -> Gallery:
    return open_gallery(str(source), {}, ("image", "video"), 1000, **options)


def build(gallery: Gallery, weights: str = "w", many: int = 10**9) -> tuple[Index, int]:
    """The index, and how many calls of the model it took."""
    model = ColourModel()
    return open_index(model, gallery, weights, lambda _: None, many), model.calls


def first_caption(found: Index, gallery: Gallery, text: str) -> str:
    return gallery.read(found.search(ColourModel().encode_text([text])[0], 3)[0].number).captions[0]


def test_it_finds_pictures_and_clips_and_is_built_once(tmp_path: Path) -> None:
    gallery = opened(colours_shard(tmp_path))
    assert gallery.counts() == {"image": 12, "video": 2}
    assert gallery.labels == tuple(sorted(NAMES))
    found, calls = build(gallery)
    assert calls > 0
    for name in NAMES:
        assert first_caption(found, gallery, name).startswith(name)
    numbers = {one.number for one in found.search(ColourModel().encode_text(["blue"])[0], 5)}
    assert any(gallery.media(number) == "video" for number in numbers)
    again, calls = build(opened(tmp_path / "colours.tar"))
    assert calls == 0, "it was kept"
    assert isinstance(again.nearest, Exact)
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("serve-")] != []


def test_other_weights_and_other_shards_have_another_one(tmp_path: Path) -> None:
    shard = colours_shard(tmp_path)
    build(opened(shard))
    assert build(opened(shard), weights="others")[1] > 0
    colours_shard(tmp_path, count=3)
    assert build(opened(shard))[1] > 0
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "b.tar").write_bytes(shard.read_bytes())
    assert opened(moved / "b.tar").identity == opened(shard).identity, "contents count, not names"


def test_a_foreign_index_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = opened(colours_shard(tmp_path))
    build(gallery)
    monkeypatch.setattr(signed_file, "index_secret", lambda: b"of somebody else")
    assert build(gallery)[1] > 0


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(index_module, "cache_folder", lambda: cache)
    gallery = opened(colours_shard(tmp_path))
    gallery.folder = tmp_path / "colours.tar"  # a file is no folder
    assert build(gallery)[1] > 0
    assert [one.name.startswith("serve-") for one in cache.iterdir()] == [True]
    assert build(gallery)[1] == 0


def test_bad_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    members = {"a.png": png(picture("red")), "b.png": b"\x89PNG\r\n\x1a\nno picture", "c.png": png(picture("blue"))}
    gallery = opened(write_tar(tmp_path / "some.tar", members))
    found, _ = build(gallery)
    assert (found.left_out, found.numbers.tolist()) == (1, [0, 2])
    bad = opened(write_tar(tmp_path / "bad.tar", {"b.png": b"\x89PNG\r\n\x1a\nno picture"}))
    with pytest.raises(DataError, match="none of its 1 pictures and clips can be read"):
        build(bad)


def test_many_samples_are_thinned_evenly(tmp_path: Path) -> None:
    gallery = open_gallery(str(colours_shard(tmp_path)), {}, ("image",), 4)
    assert [gallery.read(number).key for number in range(len(gallery))] == ["red-0", "red-1", "red-2", "red-3"]


def test_the_default_is_what_no_plan_trains_on() -> None:
    gallery = open_gallery(None, {}, ("image", "video"), 100_000)
    assert gallery.counts() == {"image": 1599, "video": 136}
    styles = {gallery.read(number).meta["style"] for number in range(0, 1599, 100)}
    assert styles == set(UNSEEN["image"]["style"])
    assert "clip" not in gallery.name and gallery.folder is not None


def test_a_source_with_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample of kind image is left"):
        opened(write_tar(tmp_path / "texts.tar", {"a.txt": b"a text"}))
    with pytest.raises(UserError, match="nothing"):
        opened(tmp_path / "nothing.tar")


def test_hash_of_weights_depends_on_bytes_alone(tmp_path: Path) -> None:
    for name, data in (("a.safetensors", b"1"), ("b.safetensors", b"1"), ("c.safetensors", b"2")):
        (tmp_path / name).write_bytes(data)
    one, same, other = (weights_hash(tmp_path / f"{name}.safetensors") for name in "abc")
    assert one == same != other
    assert weights_hash(tmp_path) not in (one, other)


@pytest.mark.skipif(not has_faiss(), reason="needs faiss-cpu (the extra 'demo')")
def test_faiss_is_kept_beside_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = opened(colours_shard(tmp_path, count=9))
    plain, _ = build(gallery)
    found, calls = build(gallery, many=10)
    assert calls == 1, "only the texts that it is tuned with"
    assert isinstance(found.nearest, Faiss)
    assert first_caption(found, gallery, "green").startswith("green")
    assert build(gallery, many=10)[1] == 0
    query = ColourModel().encode_text(["red"])[0]
    assert {one.number for one in found.search(query, 5)} <= {one.number for one in plain.search(query, 12)}
    assert np.all(found.numbers == plain.numbers)

import errno
import gc
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from patience import wait_for

from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.filters import value_matches
from omnivl.data.inspect import inspect_source
from omnivl.data.loader import Loader
from omnivl.data.sizes import InputSizes
from omnivl.data.sources import open_source
from omnivl.data.sources.base import BadSampleError
from omnivl.data.sources.open_shards import MOST_OPEN
from omnivl.data.sources.patterns import expand_pattern, is_glob
from omnivl.data.sources.presence import why_unreadable
from omnivl.data.sources.shards import ShardSource
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see which files are open")


def test_braces_ranges_and_lists(tmp_path):
    assert expand_pattern("d/{08..11}.tar") == ("d/08.tar", "d/09.tar", "d/10.tar", "d/11.tar")
    assert expand_pattern("{a,b}/{0..1}.tar") == ("a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar")


def test_globs_and_folders_are_sorted(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    both = (str(tmp_path / "a.tar"), str(tmp_path / "b.tar"))
    assert expand_pattern(str(tmp_path)) == both
    assert expand_pattern(str(tmp_path / "*.tar")) == both


BRACKETS = (
    "a[1].tar",
    "b[!x].tar",
    "[abc].tar",
    "what?.tar",
    "star*.tar",
    "{c,d}.tar",
    "{0..3}.tar",
    "[.tar",
    "e]{.tar",
)


@pytest.mark.parametrize("name", BRACKETS)
def test_a_file_is_taken_by_its_very_name(write_tar, pairs, tmp_path, name):
    path = str(write_tar(pairs(2), name))
    for other in ("a1.tar", "bz.tar", "a.tar", "whatx.tar", "starx.tar", "c.tar", "0.tar"):
        write_tar(pairs(1), other)
    assert expand_pattern(path) == (path,)
    assert not is_glob(path)
    source = open_source(DataEntryConfig(path, "image_text"), seed=0)
    assert [source.read(row).where for row in range(2)] == [f"{path}:0000", f"{path}:0001"]
    assert Path(f"{path}.index.safetensors").is_file()
    assert keys(open_source(DataEntryConfig(path, "image_text"), seed=0)) == ["0000", "0001"], "by its index"
    assert inspect_source(path).samples == 2


@pytest.mark.parametrize("name", ["run[3]", "set {a,b}", "what?", "*", "[!a]", "{1..2}"])
def test_a_folder_is_taken_by_its_very_name(write_tar, pairs, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for shard in ("x.tar", "y[1].tar"):
        write_tar(pairs(1), f"{name}/{shard}")
    write_tar(pairs(1), "other.tar")
    both = (f"{folder}/x.tar", f"{folder}/y[1].tar")
    for pattern in (str(folder), f"{folder}/"):
        assert expand_pattern(pattern) == both
        assert not is_glob(pattern)
    cache = tmp_path / "cache [2]"
    source = open_source(DataEntryConfig(str(folder), "image_text"), seed=0, index_cache=str(cache))
    assert [source.read(row).where for row in range(2)] == [f"{shard}:0000" for shard in both]
    assert len(list(cache.iterdir())) == 2
    assert inspect_source(str(folder)).samples == 2


def test_names_with_brackets_among_patterns(write_tar, pairs, tmp_path):
    for name in ("a[1].tar", "b[1].tar", "b1.tar", "c.tar"):
        write_tar(pairs(1), name)
    place = str(tmp_path)

    def names(pattern: str) -> list[str]:
        return [Path(path).name for path in expand_pattern(f"{place}/{pattern}")]

    assert names("{a,b}[1].tar") == ["a[1].tar", "b[1].tar"]
    assert names("{a[1],c}.tar") == ["a[1].tar", "c.tar"]
    assert names("b[[]1].tar") == ["b[1].tar"]
    assert names("b*.tar") == ["b1.tar", "b[1].tar"]
    (tmp_path / "b[1].tar").unlink()
    assert names("b[1].tar") == ["b1.tar"], "only what exists is no glob"
    assert names("{a,b}[1].tar") == ["a[1].tar", "b1.tar"]


def test_a_link_with_brackets_that_leads_nowhere_is_named(tmp_path):
    link = tmp_path / "a[1].tar"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a\[1\]\.tar: No such file or directory"):
        open_source(DataEntryConfig(str(link), "image_text"), seed=0)


def test_a_shard_that_is_not_there_is_named_with_what_its_author_may_not_know(write_tar, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(pairs(1), "there.tar")
    (tmp_path / "link.tar").symlink_to("/nowhere/x.tar")
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo("pipe.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    absent = "No such file or directory"
    assert [why_unreadable(name) for name in ("there.tar", "gone.tar", "there", "$D/x.tar", "link.tar")] == [
        None,
        absent,
        f"{absent}, but there is there.tar",
        f"{absent}, and a variable that is not set stays as it is written",
        "a link to /nowhere/x.tar, where nothing is",
    ]
    assert [why_unreadable(name) for name in ("folder.tar", "pipe.tar", "empty.tar", "a\0b")] == [
        *("a folder", "no regular file", "empty", "embedded null byte")
    ]


def test_no_shard_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_source(DataEntryConfig("gone.tar", "image"), seed=0)
    assert str(error.value) == (
        "data source 'gone.tar': none of its 1 shards can be read; the first: gone.tar: No such file or directory; the "
        f"working folder is {tmp_path}; mend them, or name others"
    )


def test_nothing_matches(tmp_path):
    pattern = str(tmp_path / "*.tar")
    with pytest.raises(DataError) as error:
        expand_pattern(pattern)
    assert str(error.value) == (
        f"data source {pattern!r}: no shard matches; allowed: a .tar file, a folder with .tar files, a glob or a "
        f"brace pattern such as data/{{000..127}}.tar; the working folder is {Path.cwd()}"
    )


@pytest.fixture
def mixed(write_tar, png, encode_picture) -> str:
    """Two captions, one label, one of both with a tag list, one with neither, one clip."""
    records = {
        "a": {"caption": "first", "split": "train"},
        "b": {"captions": ["second", "zweitens"], "split": "test"},
        "c": {"label": "cat", "split": "train"},
        "d": {"caption": "fourth", "label": "dog", "identity": "id-4", "tags": ["x", "y"], "split": "train"},
        "e": {"split": "train"},
    }
    members = [(f"{key}.png", png) for key in records] + [("f.mp4", b"clip"), ("f.json", b'{"caption": "moves"}')]
    members += [(f"{key}.json", json.dumps(record).encode()) for key, record in records.items()]
    return str(write_tar(sorted(members)))


def keys(source: ShardSource) -> list[str]:
    return [source.read(index).key for index in range(len(source))]


def test_kind_decides_which_samples_belong(mixed):
    captioned = open_source(DataEntryConfig(mixed, "image_text"), seed=0)
    assert keys(captioned) == ["a", "b", "d"]
    assert [(entry.cause, entry.where) for entry in captioned.rejections] == [("missing_caption", f"{mixed}:e")]
    labelled = open_source(DataEntryConfig(mixed, "image_label"), seed=0)
    assert keys(labelled) == ["c", "d"]
    assert labelled.classes == ("cat", "dog")
    assert [entry.cause for entry in labelled.rejections] == ["missing_label"]
    assert keys(open_source(DataEntryConfig(mixed, "video_text"), seed=0)) == ["f"]


def test_text_and_pictures_alone(mixed):
    assert keys(open_source(DataEntryConfig(mixed, "text"), seed=0)) == ["a", "b", "d", "f"]
    assert open_source(DataEntryConfig(mixed, "text"), seed=0).read(0).media is None
    shown = open_source(DataEntryConfig(mixed, "image"), seed=0)
    assert keys(shown) == ["a", "b", "c", "d", "e"]
    assert shown.rejections == []
    assert keys(open_source(DataEntryConfig(mixed, "video"), seed=0)) == ["f"]


def test_a_sample_without_a_file_is_bad_for_pictures_and_good_for_texts(write_tar, png):
    path = str(write_tar([("a.png", png), ("a.txt", b"one"), ("b.txt", b"two"), ("c.tiff", b"x"), ("c.txt", b"three")]))
    shown = open_source(DataEntryConfig(path, "image_text"), seed=0)
    assert keys(shown) == ["a"]
    found = [(entry.cause, entry.where) for entry in shown.rejections]
    assert found == [("missing_media", f"{path}:b"), ("unknown_extension", f"{path}:c")]
    said = open_source(DataEntryConfig(path, "text"), seed=0)
    assert (keys(said), said.rejections) == (["a", "b", "c"], [])


def test_named_pictures_and_masks(write_tar, png, encode_picture):
    other = encode_picture(".png", value=7)
    members = [
        *(("a.left.png", png), ("a.right.png", other), ("a.mask.png", b"mask"), ("a.json", b'{"caption": "both"}')),
        *(("b.left.png", png), ("b.json", b'{"caption": "one"}'), ("c.png", png), ("c.json", b'{"caption": "own"}')),
    ]
    path = str(write_tar(members))
    named = {"pictures": ("left.png", "right.png"), "fields": {"inside": "mask.png", "id": "id"}}
    both = open_source(DataEntryConfig(path, "images_text", **named), seed=0)
    assert keys(both) == ["a"]
    assert both.read(0).members == {"left.png": png, "right.png": other, "mask.png": b"mask"}
    (found,) = both.rejections
    assert (found.cause, found.where) == ("missing_media", f"{path}:b")
    assert found.detail == "no right.png; wanted: 2 of left.png, right.png"
    assert keys(open_source(DataEntryConfig(path, "images_text", least_pictures=1, **named), seed=0)) == ["a", "b"]
    any_format = open_source(DataEntryConfig(path, "images_text", pictures=("right", "left")), seed=0)
    assert any_format.read(0).members == {"right.png": other, "left.png": png}
    left = open_source(DataEntryConfig(path, "image_text", pictures=("left.png",)), seed=0)
    assert (keys(left), left.rejections) == (["a", "b"], [])
    assert keys(open_source(DataEntryConfig(path, "image_text"), seed=0)) == ["c"]


def test_a_text_that_is_no_caption_is_looked_for_when_a_sample_is_read(write_tar, png):
    path = str(write_tar([("a.png", png), ("a.json", b'{"question": "what?"}'), ("b.png", png), ("b.json", b"{}")]))
    source = open_source(DataEntryConfig(path, "image_text", text="question"), seed=0)
    assert (keys(source), source.rejections) == (["a", "b"], [])


def test_where_filters_scalars_and_lists(mixed):
    assert keys(open_source(DataEntryConfig(mixed, "image_text", where={"split": ("train",)}), seed=0)) == ["a", "d"]
    assert keys(open_source(DataEntryConfig(mixed, "image_text", where={"tags": ("y", "z")}), seed=0)) == ["d"]


def test_a_sample_carries_its_fields(mixed):
    sample = open_source(DataEntryConfig(mixed, "image_text"), seed=0).read(2)
    assert sample.captions == ("fourth",)
    assert (sample.label, sample.identity, sample.extension) == ("dog", "id-4", "png")
    assert sample.where == f"{mixed}:d"
    assert sample.meta["tags"] == ["x", "y"]


def test_languages(write_tar, png):
    record = {"captions": {"en": ["dog", "hound"], "de": "Hund"}}
    path = str(write_tar([("a.png", png), ("a.json", json.dumps(record).encode())]))
    assert open_source(DataEntryConfig(path, "image_text", language="de"), seed=0).read(0).captions == ("Hund",)
    with pytest.raises(DataError, match="no sample of kind image_text is left"):
        open_source(DataEntryConfig(path, "image_text", language="fr"), seed=0)


def test_img2dataset_and_cls_members(write_tar, png):
    members = [("0.png", png), ("0.txt", b"a caption\n"), ("0.json", b'{"status": "success"}'), ("1.png", png)]
    path = str(write_tar([*members, ("1.cls", b"7")]))
    assert open_source(DataEntryConfig(path, "image_text"), seed=0).read(0).captions == ("a caption",)
    assert open_source(DataEntryConfig(path, "image_label"), seed=0).classes == ("7",)


def test_no_sample_left_says_what_is_there(mixed):
    with pytest.raises(DataError) as error:
        open_source(DataEntryConfig(mixed, "image_text", where={"split": ("valid",)}), seed=0)
    assert str(error.value) == (
        f"data source {mixed!r}: no sample of kind image_text is left (where: split in ['valid']); its 1 shards hold "
        f"5 stills and 1 clips, metadata fields ['label', 'split', 'tags'], rejected {{}}; change the kind, 'where' "
        f"or the path"
    )


def test_a_pickled_source_reads_the_same(mixed):
    source = open_source(DataEntryConfig(mixed, "image_text"), seed=0)
    expected = [source.read(index) for index in range(3)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(index) for index in range(3)] == expected


def test_a_shard_that_shrinks_or_vanishes_after_opening(mixed):
    config = DataEntryConfig(mixed, "image_text")
    source, late = open_source(config, seed=0), open_source(config, seed=0)
    source.read(0)
    Path(mixed).write_bytes(Path(mixed).read_bytes()[:600])
    with pytest.raises(BadSampleError) as error:
        source.read(2)
    assert error.value.rejection.cause == "truncated_tar"
    Path(mixed).unlink()
    with pytest.raises(BadSampleError) as error:
        late.read(0)
    assert error.value.rejection.cause == "unreadable_path"


def open_shards(folder: Path) -> int:
    """How many files of a folder this process has open."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of this very listing
            found += descriptor.readlink().parent == folder
    return found


@pytest.fixture
def many(write_tar, pairs, tmp_path) -> str:
    """More shards of one sample each than a source keeps open."""
    for number in range(MOST_OPEN + 16):
        write_tar(pairs(1), f"{number:03d}.tar")
    return str(tmp_path)


@needs_proc
def test_shards_read_last_stay_open_and_all_are_closed_at_the_end(many, tmp_path):
    source = open_source(DataEntryConfig(many, "image_text"), seed=0)
    for row in range(MOST_OPEN):
        source.read(row)
    first, second = tmp_path / "000.tar", tmp_path / "001.tar"
    first.unlink()
    second.unlink()
    assert source.read(0).key == "0000", "open still"
    for row in range(MOST_OPEN, MOST_OPEN + 16):
        source.read(row)
    assert open_shards(tmp_path) == MOST_OPEN
    assert source.read(0).key == "0000", "read later than the second, which was closed"
    with pytest.raises(BadSampleError, match="No such file"):
        source.read(1)
    source.close()
    assert open_shards(tmp_path) == 0
    assert source.read(2).key == "0000", "opened again"
    del source
    gc.collect()
    assert open_shards(tmp_path) == 0


@needs_proc
def test_a_shard_stays_open_while_a_thread_reads_it(many, tmp_path, monkeypatch):
    source = open_source(DataEntryConfig(many, "image_text"), seed=0)
    expected, pread, nested = source.read(0), os.pread, []

    def others_read_first(descriptor: int, size: int, offset: int) -> bytes:
        if not nested:
            nested.append(True)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(source.read, range(1, MOST_OPEN + 16)))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", others_read_first)
    assert source.read(0) == expected
    assert open_shards(tmp_path) == MOST_OPEN


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_sample_s_fault(many, tmp_path, monkeypatch, code):
    source = open_source(DataEntryConfig(many, "image_text"), seed=0)

    def refuses(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(DataError) as refused:
        source.read(3)
    assert not isinstance(refused.value, BadSampleError)
    assert str(refused.value) == (
        f"{tmp_path}/003.tar: got {os.strerror(code)!r}; each source keeps up to 64 shards open in each process that "
        "reads it; raise the limit (`ulimit -n`), or use fewer sources"
    )


@needs_proc
@pytest.mark.filterwarnings("ignore:data source .* is a stream")
@pytest.mark.parametrize("form", ["{}", "pipe:cat {}/{{000..079}}.tar"])
def test_a_closed_loader_leaves_nothing_open(many, tmp_path, form):
    sizes = InputSizes(image_size=16, video_size=16, num_frames=2, patch_size=8, tubelet_size=1, text_length=6)
    entry = DataEntryConfig(form.format(many), "image_text")
    config = LoaderConfig(num_workers=0, shuffle_buffer=4)
    before = set(psutil.Process().children())
    with Loader(
        [entry], loader_config=config, sizes=sizes, tokenizer=load_tokenizer("emoji"), micro_batch_size=16
    ) as loader:
        batches = iter(loader)
        for _ in range(2):
            next(batches)
        wait_for(  # between two shards a stream has no program
            lambda: open_shards(tmp_path) > 0 or set(psutil.Process().children()) > before, 10, "something is open"
        )
    assert open_shards(tmp_path) == 0
    assert set(psutil.Process().children()) == before


def test_values_match_by_text():
    assert value_matches(3, ("3",))
    assert value_matches(True, ("true",))
    assert value_matches(["a", "b"], ("b",))
    assert not value_matches("3x", ("3",))

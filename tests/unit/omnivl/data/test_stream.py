import gzip
import json
import os

import pytest

from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.loader import Loader
from omnivl.data.sizes import InputSizes
from omnivl.data.sources import is_stream, open_source
from omnivl.data.sources.stream import StreamReader, expand_stream
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError


@pytest.fixture
def shards(write_tar, png, tmp_path) -> str:
    """Six shards of four samples, named by shard and number."""
    for shard in range(6):
        members = []
        for number in range(4):
            record = {"caption": f"{shard}-{number}", "split": "train" if number else "test"}
            members += [(f"{number}.png", png), (f"{number}.json", json.dumps(record).encode())]
        write_tar(members, f"{shard}.tar")
    return f"pipe:cat {tmp_path}/{{0..5}}.tar"


def reader(
    source: str, number: int = 0, readers: int = 1, first: int = 0, buffer: int = 1, **fields: object
) -> StreamReader:
    config = DataEntryConfig(source, fields.pop("kind", "image_text"), **fields)
    return StreamReader(config, key="k", seed=0, buffer=buffer, reader=number, readers=readers, first_shard=first)


def captions(stream: StreamReader, count: int) -> list[str]:
    return [stream.next().captions[0] for _ in range(count)]


EVERYTHING = sorted(f"{shard}-{number}" for shard in range(6) for number in range(4))


def test_prefixes():
    assert is_stream("pipe:cat x")
    assert is_stream("https://host/x.tar")
    assert not is_stream("/data/x.tar")
    assert is_stream("S3://b/x.tar")
    assert expand_stream("s3://b/{0..1}.tar") == ("s3://b/0.tar", "s3://b/1.tar")


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_readers_share_an_epoch_without_loss_or_doubles(shards, readers):
    taken = [text for number in range(readers) for text in captions(reader(shards, number, readers), 24 // readers)]
    assert sorted(taken) == EVERYTHING


def test_the_buffer_shuffles_and_the_seed_repeats(shards):
    plain, mixed = captions(reader(shards), 24), captions(reader(shards, buffer=8), 24)
    assert mixed == captions(reader(shards, buffer=8), 24)
    assert plain != mixed
    shards_of_first_eight = {text[0] for text in mixed[:8]}
    assert len(shards_of_first_eight) > 2, "without a buffer it would be two"


def test_epochs_have_different_orders_of_shards(shards):
    stream = reader(shards)
    first, second = captions(stream, 24), captions(stream, 24)
    assert sorted(second) == EVERYTHING
    assert first != second


def test_resume_by_shard(shards):
    stream = reader(shards)
    done = captions(stream, 10)  # two shards and a half
    assert stream.shard == 2
    rest = captions(reader(shards, first=stream.shard), 16)
    assert sorted(set(done) | set(rest)) == EVERYTHING
    assert len(set(done) & set(rest)) == 2, "of the shard that was begun two are seen again"


def test_filters(shards):
    assert sorted(captions(reader(shards, where={"split": ("test",)}), 6)) == [f"{shard}-0" for shard in range(6)]


def test_bad_shards_and_samples_are_noted(write_tar, png, tmp_path, shards):
    whole = (tmp_path / "3.tar").read_bytes()
    (tmp_path / "3.tar").write_bytes(whole[:2600])
    (tmp_path / "4.tar").unlink()
    write_tar([("a.png", png), ("a.json", b"{"), ("b.png", png), ("b.json", b'{"caption": "b"}')], "5.tar")
    stream = reader(shards)
    captions(stream, 40)
    causes = {(entry.cause, entry.where.rsplit("/", 1)[1]) for entry in stream.rejections}
    assert causes == {("truncated_tar", "3.tar"), ("truncated_tar", "4.tar"), ("wrong_json", "5.tar:a")}


def test_a_stream_without_samples_ends(shards):
    with pytest.raises(DataError) as error:
        reader(shards, kind="video_text").next()
    assert str(error.value) == (
        f"data source {shards!r}: 12 shards in a row gave no sample of kind video_text; the last one: no sample passes "
        f"the filter"
    )


def test_a_stream_cannot_be_opened_as_a_list():
    with pytest.raises(DataError, match="a stream has no list of samples"):
        open_source(DataEntryConfig("pipe:cat x.tar", "image_text"), seed=0)


def test_streams_know_the_same_kinds_as_lists(write_tar, png, tmp_path):
    members = [
        *(("a.left.png", png), ("a.right.png", png), ("a.json", b'{"question": "same?", "answer": "yes"}')),
        *(("b.left.png", png), ("b.json", b'{"question": "same?"}'), ("c.txt", b"only said"), ("d.png", png)),
    ]
    write_tar(members, "x.tar")
    source = f"pipe:cat {tmp_path}/x.tar"
    pair = reader(source, kind="images_text", pictures=("left.png", "right.png"), text="question")
    assert [pair.next().key for _ in range(2)] == ["a", "a"]
    assert {(entry.cause, entry.where.rpartition(":")[2]) for entry in pair.rejections} == {("missing_media", "b")}
    said = reader(source, kind="text")
    assert [said.next().captions for _ in range(2)] == [("only said",)] * 2
    shown = reader(source, kind="image")
    assert [shown.next().key for _ in range(2)] == ["d", "d"]
    assert shown.next().members == {}


def test_a_duplicate_member_costs_its_sample_only(write_tar, png, tmp_path):
    members = [
        ("a.png", png),
        ("a.txt", b"a"),
        ("b.png", png),
        ("b.jpg", png),
        ("b.txt", b"b"),
        ("__info__.json", b"{}"),
    ]
    write_tar([*members, ("c.png", png), ("c.txt", b"c")], "x.tar")
    stream = reader(f"pipe:cat {tmp_path}/x.tar")
    assert captions(stream, 4) == ["a", "c", "a", "c"]
    assert [(entry.cause, entry.where.rpartition(":")[2]) for entry in stream.rejections] == [
        ("duplicate_key", "b")
    ] * 2


def test_joined_and_compressed_shards_are_read_to_their_end(write_tar, pairs, tmp_path):
    first = write_tar(pairs(3), "0.tar").read_bytes()
    second = write_tar([(f"9{name}", data) for name, data in pairs(2)], "1.tar").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    (tmp_path / "x.tar").write_bytes(first + second)
    for name in ("x.tar", "x.tar.gz"):
        stream = reader(f"pipe:cat {tmp_path}/{name}")
        assert [stream.next().key for _ in range(6)] == ["0000", "0001", "0002", "90000", "90001", "0000"]
        assert stream.rejections == []


def test_a_stream_has_the_samples_of_the_list(write_tar, png, tmp_path):
    """Whatever is wrong with a shard: the same keys, and the same causes by sample."""
    members = [
        *(("a.png", png), ("a.txt", b"a"), ("b.png", png), ("b.json", b'{"caption": "\\ud800"}'), ("c.exe", png)),
        *(("c.txt", b"c"), ("d.png", png), ("d.txt", b"d"), ("a.png", png), ("a.txt", b"again"), ("e.png", png)),
        *(("e.txt", b"e"), ("f.txt", b"\xff"), ("f.png", png), ("g.png", png)),
    ]
    path = write_tar(members, "x.tar")
    config = DataEntryConfig(str(path), "image_text")
    listed = open_source(config, seed=0)
    stream = reader(f"pipe:cat {path}")
    assert [stream.next().key for _ in range(len(listed))] == [listed.read(row).key for row in range(len(listed))]
    stream.next()  # to the end of the shard
    seen = {(entry.cause, entry.where.rpartition(":")[2]) for entry in stream.rejections}
    assert seen == {(entry.cause, entry.where.rpartition(":")[2]) for entry in listed.rejections} | {
        ("unknown_extension", "c")
    }


def test_a_program_that_fails_at_the_end_makes_its_shard_bad(write_tar, pairs, tmp_path):
    write_tar(pairs(2), "x.tar")
    stream = reader(f"pipe:cat {tmp_path}/x.tar; echo connection reset >&2; exit 1")
    assert captions(stream, 3)[:2] == ["thing 0", "thing 1"]
    assert stream.rejections[0].detail == "the program ended with status 1: connection reset"


def test_a_text_that_is_wrong_is_named_also_where_the_picture_is_missing(write_tar, png, tmp_path):
    path = write_tar([("a.json", b"{"), ("b.png", png), ("b.txt", b"b")], "x.tar")
    stream = reader(f"pipe:cat {path}")
    assert captions(stream, 2) == ["b", "b"]
    listed = open_source(DataEntryConfig(str(path), "image_text"), seed=0).rejections
    assert {(one.cause, one.detail) for one in stream.rejections} == {(one.cause, one.detail) for one in listed}
    assert [one.cause for one in listed] == ["wrong_json"]


def silent_reader(source: str, silent: float = 0.3) -> StreamReader:
    config = DataEntryConfig(source, "image_text")
    return StreamReader(config, key="k", seed=0, buffer=1, reader=0, readers=1, first_shard=0, **{"timeout": silent})


def test_a_stream_that_sends_nothing_ends_the_run_in_bounded_time():
    source = "pipe:sleep 60; : {0..999}"
    with pytest.raises(DataError) as error:
        silent_reader(source).next()
    text = str(error.value)
    assert text.startswith(f"data source {source!r}: 2 shards in a row sent nothing any more; the last one: pipe:sleep")
    assert text.endswith(
        "nothing came for 0.3 s; see whether what sends it still runs and can be reached, or raise "
        "loader.stream_timeout_seconds"
    )


def test_one_silent_shard_among_others_is_bad_and_passed_over(write_tar, pairs, tmp_path):
    for shard in range(3):
        write_tar(pairs(2), f"{shard}.tar")
    (tmp_path / "1.tar").unlink()
    os.mkfifo(tmp_path / "1.tar")
    stream = silent_reader(f"pipe:cat {tmp_path}/{{0..2}}.tar", silent=2)
    assert captions(stream, 8) == ["thing 0", "thing 1"] * 4
    assert {(entry.cause, entry.where.rpartition("/")[2]) for entry in stream.rejections} == {
        ("unreadable_path", "1.tar")
    }


def test_the_loader_passes_the_time_limit_on():
    with pytest.warns(UserWarning, match="is a stream"):
        loader = Loader(
            [DataEntryConfig("pipe:sleep 60", "image_text")],
            loader_config=LoaderConfig(stream_timeout_seconds=0.2),
            sizes=InputSizes(32, 32, 2, 16, 1, 8),
            tokenizer=load_tokenizer("emoji"),
            micro_batch_size=2,
        )
    with loader, pytest.raises(DataError, match="2 shards in a row sent nothing"):
        next(iter(loader))

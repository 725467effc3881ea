"""The reader of tar archives: what ``tarfile`` and GNU tar write, joined archives, and headers that lie."""

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from omnivl.data.archive import BLOCK, ArchiveError, FileBytes, Member, TarReader
from omnivl.data.groups import group_members
from omnivl.data.index import ShardIndex, build_index
from omnivl.data.sources.stream import _with_bytes

GNU_TAR = shutil.which("tar")


def archive(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            for field, value in fields.items():
                setattr(header, field, value)
            tar.addfile(header, io.BytesIO(data))
    return out.getvalue()


def header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """One block with a right checksum."""
    block = bytearray(BLOCK)
    block[: len(name)], block[100:108], block[124 : 124 + len(size)] = name, b"0000644\0", size
    block[156:157], block[157 : 157 + len(link)], block[257:265] = kind, link, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return header(b"pax", b"%011o" % len(records), b"x") + records + bytes(-len(records) % BLOCK)


def listed(data: bytes) -> list[tuple[str, bytes]]:
    """Names and bytes, as a stream gives them."""
    reader = TarReader(io.BytesIO(data))
    return [(f"{one.key}.{one.extension}", b"" if one.refused else reader.read(one)) for one in reader]


def refusals(data: bytes) -> dict[str, str]:
    return {one.key: one.refused for one in TarReader(io.BytesIO(data)) if one.refused is not None}


def streamed_samples(data: bytes) -> list[str]:
    """Keys of the good samples of a stream."""
    keys: list[str] = []
    members = _with_bytes(TarReader(io.BytesIO(data)))
    try:
        for group in group_members(members):
            keys += [group.key] if group.problem is None else []
    except ArchiveError:
        return keys
    return keys


@pytest.fixture
def indexed(tmp_path: Path) -> Callable[[bytes], ShardIndex]:
    def index(data: bytes) -> ShardIndex:
        (tmp_path / "x.tar").write_bytes(data)
        return build_index(tmp_path / "x.tar", "s")

    return index


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "./b.jpg", f"{'d' * 60}/{'f' * 70}.jpg", "größe.jpg"])
def test_names_of_every_format(form, name):
    assert listed(archive([(name, b"one"), ("z.txt", b"two")], form)) == [(name, b"one"), ("z.txt", b"two")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header(form):
    name = f"{'long/' * 60}{'x' * 200}.json"
    assert listed(archive([(name, b"{}")], form)) == [(name, b"{}")]


def test_bytes_of_a_name_that_are_no_utf8_are_escaped():
    data = archive([("caf\udce9.jpg", b"P")], tarfile.USTAR_FORMAT)
    assert listed(data) == [("caf\\xe9.jpg", b"P")]


def test_times_that_gnu_tar_puts_where_posix_has_a_prefix():
    block = bytearray(header(b"a.jpg", b"%011o" % 1))
    block[257:265], block[345:357] = b"ustar  \0", b"14700000000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert listed(bytes(block) + b"P".ljust(BLOCK, b"\0") + bytes(2 * BLOCK)) == [("a.jpg", b"P")]


def test_a_size_in_a_pax_header_counts():
    data = pax(b"12 size=513\n") + header(b"a.jpg", b"%011o" % 0) + bytes(1024) + archive([("b.jpg", b"Q")])
    assert listed(data) == [("a.jpg", bytes(513)), ("b.jpg", b"Q")]


def test_a_binary_size_counts():
    data = header(b"a.jpg", b"\x80" + (3).to_bytes(11, "big")) + b"abc".ljust(BLOCK, b"\0") + bytes(1024)
    assert listed(data) == [("a.jpg", b"abc")]


def test_joined_archives_are_read_to_the_end(indexed):
    parts = [archive([(f"{number}.png", b"P"), (f"{number}.txt", b"t")]) for number in range(3)]
    assert indexed(b"".join(parts)).keys == ("0", "1", "2")
    assert [name for name, _ in listed(b"".join(parts))] == [name for part in parts for name, _ in listed(part)]
    assert indexed(b"".join(parts)).rejections == ()


def test_a_sample_does_not_reach_over_an_end_mark(indexed):
    index = indexed(archive([("a.png", b"P")]) + archive([("a.txt", b"t")]))
    assert [entry.cause for entry in index.rejections] == ["scattered_members"]
    assert index.keys == ()


@pytest.mark.parametrize("rest", [b"junk", b"j" * 700, b"\0" * 100 + b"j"])
def test_what_is_no_archive_behind_an_end_mark_is_named(indexed, rest):
    index = indexed(archive([("a.png", b"P")]) + rest)
    assert index.keys == ("a",)
    assert [entry.cause for entry in index.rejections] == ["truncated_tar"]
    assert "bytes that are no header" in index.rejections[0].detail


def test_zeros_behind_an_end_mark_are_filling(indexed):
    assert indexed(archive([("a.png", b"P")]) + bytes(70_001)).rejections == ()


def test_an_endless_stream_of_zeros_ends():
    class Zeros(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    with pytest.raises(ArchiveError, match="more than 67108864 bytes of zeros"):
        list(TarReader(Zeros()))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (b"1", "a hard link to '0.jpg', whose bytes stand elsewhere; write the archive with tar --hard-dereference"),
        (b"2", "a symbolic link to '0.jpg', which has no bytes; write the archive with tar --dereference"),
        (b"6", "a FIFO, which has no bytes; leave it out"),
        (b"M", "the rest of a file that begins in another archive; join the volumes"),
        (b"Z", "of the unknown type b'Z'; write the archive anew"),
        (b"{", "of the unknown type b'{'; write the archive anew"),
        (b"}", "of the unknown type b'}'; write the archive anew"),
    ],
)
def test_members_without_bytes_of_their_own_are_refused_by_name(indexed, kind, found):
    data = header(b"1.jpg", b"%011o" % 0, kind, b"0.jpg") + archive([("1.txt", b"t"), ("2.jpg", b"P")])
    assert refusals(data) == {"1": f".jpg is {found}"}
    index = indexed(data)
    assert index.keys == ("2",)
    assert [(entry.cause, entry.where, entry.detail) for entry in index.rejections] == [
        ("unusable_member", "s:1", f".jpg is {found}")
    ]


@pytest.mark.skipif(GNU_TAR is None, reason="needs the program tar")
def test_what_gnu_tar_writes(tmp_path, indexed):
    """Hard and symbolic links, sparse files of all four forms, long names; each is read rightly or refused."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"picture")
    os.link(folder / "a.jpg", folder / "b.jpg")
    (folder / "c.jpg").symlink_to("a.jpg")
    with (folder / "d.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"island")
    (folder / f"{'e' * 150}.jpg").write_bytes(b"long")
    for options in (
        ["--format=gnu"],
        ["--format=pax"],
        *(["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")),
    ):
        command = [
            GNU_TAR,
            "--create",
            "--sparse",
            "--sort=name",
            *options,
            "--file",
            "-",
            *sorted(path.name for path in folder.iterdir()),
        ]
        data = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
        assert indexed(data).keys == ("a", "e" * 150), options
        reasons = [[entry.detail.split(" ")[2], entry.where] for entry in indexed(data).rejections]
        assert reasons == [["a", "s:b"], ["a", "s:c"], ["stored", "s:d"]], options
        assert dict(listed(data))["a.jpg"] == b"picture"
        assert dict(listed(data))[f"{'e' * 150}.jpg"] == b"long"


def test_notes_about_the_archive_are_no_samples(indexed):
    notes = [("__info__.json", b"{}"), ("__meta__/x.json", b"[]"), (".hidden.json", b"1"), ("__a.png", b"P")]
    index = indexed(archive(notes))
    assert (index.keys, index.rejections) == (("__a",), ())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (header(b"a.jpg", b"\xff" * 12), "says a negative size"),
        (header(b"a.jpg", b"-0000000012\0"), "says the size b'-0000000012'"),
        (header(b"a.jpg", b"\x80" + b"\x7f" * 11), "a.jpg ends behind the end of the file"),
        (pax(b"24 size=100000000000000\n") + header(b"a.jpg", b"%011o" % 0), "a.jpg ends behind the end"),
        (pax(b"11 size=-1\n") + header(b"a.jpg", b"%011o" % 0), "says the size b'-1'"),
        (pax(b"99 path=x\n") + header(b"a.jpg", b"%011o" % 0), "is damaged at its byte 0"),
        (pax(b"0 path=x\n") + header(b"a.jpg", b"%011o" % 0), "is damaged at its byte 0"),
        (header(b"x", b"77777777777", b"L"), "has 8589934591 bytes; allowed: 1048576"),
        (header(b"x", b"%011o" % 900, b"x") + b"12 path=a.b\n", "ends behind the end of the archive"),
    ],
)
def test_headers_that_lie_are_named_and_cost_nothing(indexed, data, found):
    tracemalloc.start()
    began = time.process_time()
    index = indexed(archive([("0.png", b"P")])[: 2 * BLOCK] + data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.keys == ()
    assert [entry.cause for entry in index.rejections] == ["truncated_tar"]
    assert found in index.rejections[0].detail
    assert peak < 4 << 20
    assert time.process_time() - began < 2


def test_members_that_are_too_large_are_refused(tmp_path):
    """A sparse file on the disk can be as large as its headers say."""
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(header(b"a.json", b"\x80" + (1 << 30).to_bytes(11, "big")))
        file.truncate(BLOCK + (1 << 30))
        file.seek(0, 2)
        file.write(archive([("b.png", b"P")]))
    index = build_index(path, "s")
    assert index.keys == ("b",)
    assert index.rejections[0].detail == f".json has {1 << 30} bytes; allowed: {16 << 20}"


def test_a_fifo_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    index = build_index(tmp_path / "x.tar", "s")
    assert [(entry.cause, entry.detail) for entry in index.rejections] == [("unreadable_path", "a FIFO, not a file")]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (gzip.compress(archive([("a.png", b"P")])), "this is a gzip file, not a plain tar; unpack it with gunzip"),
        (b"PK\x03\x04" + bytes(600), "this is a zip file, not a plain tar; unpack it and pack its files with tar"),
        (b"PAR1" + bytes(600), "this is a parquet file, not a plain tar; convert it with omnivl data convert table"),
    ],
)
def test_other_archives_are_called_by_their_name(indexed, data, found):
    (entry,) = indexed(data).rejections
    assert entry.cause == "wrong_archive"
    assert entry.detail.startswith(found)


@pytest.mark.parametrize("size", [2000, 1 << 33])
def test_a_sample_of_which_a_member_is_cut_is_no_sample(indexed, size):
    """In lists and streams, also where the size in the header is nonsense."""
    whole = archive([("a.png", b"P"), ("a.json", b"{}"), ("b.png", b"P"), ("b.json", b"{}")])[: 8 * BLOCK]
    data = whole + header(b"b.txt", b"\x80" + size.to_bytes(11, "big")) + b"text"
    assert indexed(data).keys == ("a",)
    assert streamed_samples(data) == ["a"]


@pytest.mark.parametrize("kind", [b"0", b"S", b"Z", b"M"])
@pytest.mark.parametrize("name", [b"c.png", b"c.exe", b"b.exe"])
@pytest.mark.parametrize("size", [2000, 1 << 33])
def test_lists_and_streams_agree_on_the_samples_before_a_cut(indexed, kind, name, size):
    """Also where the member that is cut would be refused, or is not read."""
    for first in ([("a.txt", b"one"), ("b.txt", b"two")], [("a.txt", b"one"), ("b.png", b"P"), ("b.txt", b"two")]):
        whole = archive(first)[: 2 * BLOCK * len(first)]
        data = whole + header(name, b"\x80" + size.to_bytes(11, "big"), kind) + b"bytes"
        expected = ["a", "b"] if len(first) == 3 and name.startswith(b"c") else ["a"]
        assert list(indexed(data).keys) == streamed_samples(data) == expected


def test_all_pictures_before_all_texts(indexed, png):
    """Each sample is named once; none of them is taken for one without a text."""
    pictures, texts = [(f"{number}.png", png) for number in range(3)], [(f"{number}.txt", b"t") for number in range(3)]
    index = indexed(archive([*pictures, *texts, ("9.png", png), ("9.txt", b"t")]))
    assert index.keys == ("9",)
    assert [(entry.cause, entry.where) for entry in index.rejections] == [
        ("scattered_members", f"s:{number}") for number in range(3)
    ]
    assert index.rejections[0].detail.endswith("write the archive with tar --sort=name")


def test_fields_of_every_sample_of_its_own_take_linear_memory_and_time(indexed):
    """600 samples of 100 fields each: as dense columns these were 144 MB, and 36 million steps."""
    members = [
        (f"{number}.json", ("{" + ",".join(f'"f{number}_{one}": {one}' for one in range(100)) + "}").encode())
        for number in range(600)
    ]
    data = archive(members)
    tracemalloc.start()
    began = time.process_time()
    index = indexed(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.fields) == 60_001
    assert index.fields["f3_7"][1][3] == 0
    assert peak < 150e6
    assert time.process_time() - began < 20, "with a tracer of memory on a busy machine; alone it takes one second"


def _mutated(data: bytes, random_: random.Random) -> bytes:
    """A damaged archive: bytes changed, parts cut, doubled, moved; half of the time in the fields of a header."""
    result = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        if not result:
            break
        place = random_.randrange(len(result))
        match random_.randrange(6):
            case 0:
                result[place] ^= 1 << random_.randrange(8)
            case 1:
                del result[place : place + random_.choice([1, 7, BLOCK, 3 * BLOCK])]
            case 2:
                block = place // BLOCK * BLOCK
                result[block:block] = result[block : block + BLOCK]
            case 3:
                del result[place:]
            case _:
                block = random_.randrange(0, len(result), BLOCK)
                start, length = random_.choice([(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
                values = [b"\xff", b"7", b"\0", b"\x80", b"x", b"S", b"-", random_.randbytes(length)]
                filled = (random_.choice(values) * length)[: random_.randint(1, length)]
                if block + BLOCK <= len(result):
                    result[block + start : block + start + len(filled)] = filled
                    result[block + 148 : block + 156] = b" " * 8
                    result[block + 148 : block + 156] = b"%06o\0 " % sum(result[block : block + BLOCK])
    return bytes(result)


def _as_stream(data: bytes) -> tuple[list[tuple[Member, bytes]], str | None]:
    found: list[tuple[Member, bytes]] = []
    reader = TarReader(io.BytesIO(data))
    try:
        for member in reader:
            found.append((member, b"" if member.refused else reader.read(member)))
    except ArchiveError as error:
        return found, error.detail
    return found, None


@pytest.mark.parametrize("seed", range(8))
def test_damaged_archives_end_in_no_other_error_and_give_no_other_bytes(tmp_path, png, seed):
    """Of every member that is given, the bytes are those at its place; stream and file agree on all of them."""
    random_ = random.Random(seed)
    parts = [
        (f"{number:03d}{end}", data) for number in range(4) for end, data in ((".png", png), (".json", b'{"a": 1}'))
    ]
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    whole = [archive(parts, form) for form in forms] + [archive([(f"{'n' * 130}{name}", data)]) for name, data in parts]
    path = tmp_path / "x.tar"
    for _ in range(60):
        data = _mutated(random_.choice(whole), random_)
        path.write_bytes(data)
        build_index(path, "s")  # raises nothing
        streamed, _ = _as_stream(data)
        for member, content in streamed:
            assert member.refused is not None or content == data[member.offset : member.offset + member.size]
        with path.open("rb") as file:
            try:
                for member, (other, _) in zip(TarReader(FileBytes(file.fileno())), streamed, strict=False):
                    assert member == other
            except ArchiveError:
                continue


def test_what_is_no_archive_is_said_to_be_none(tmp_path):
    path = tmp_path / "words.tar"
    path.write_text("no archive " * 100)
    (rejection,) = build_index(path, str(path)).rejections
    assert rejection.cause == "wrong_archive"
    assert rejection.detail.startswith(
        "this is no tar archive: it does not begin with a header; fetch it again if it was one, or make shards of "
        "pictures and lists with omnivl data convert"
    )

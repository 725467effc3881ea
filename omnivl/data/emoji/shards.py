"""Tar shards with reproducible bytes."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GZIP_LEVEL = 9


@dataclass(frozen=True)
class ShardSample:
    """A sample, written as KEY.extension and KEY.json.

    Attributes:
        key: Name within the set; holds no dot.
        extension: ``webp`` or ``mp4``.
        media: Encoded picture or clip.
        fields: The JSON.
    """

    key: str
    extension: str
    media: bytes
    fields: Mapping[str, object]


@dataclass(frozen=True)
class WrittenShard:
    """A written shard.

    Attributes:
        name: File name.
        samples: Number of samples.
        bytes: Size of the file.
        sha256: Digest of the file.
        tar_bytes: Size of the tar inside.
        tar_sha256: Digest of the tar inside, which does not depend on the version of zlib.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    tar_bytes: int
    tar_sha256: str


def write_shard(path: Path, samples: Sequence[ShardSample]) -> WrittenShard:
    """Writes one shard: fixed owners, modes and times, members in the given order.

    Args:
        path: ``*.tar``, or ``*.tar.gz`` for a compressed one.
        samples: In order.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            text = json.dumps(sample.fields, ensure_ascii=False, separators=(",", ":")).encode()
            for extension, data in ((sample.extension, sample.media), ("json", text)):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(data)
                member.mode = 0o644
                archive.addfile(member, io.BytesIO(data))
    plain = buffer.getvalue()
    stored = gzip.compress(plain, compresslevel=_GZIP_LEVEL, mtime=0) if path.suffix == ".gz" else plain
    path.write_bytes(stored)
    return WrittenShard(
        name=path.name,
        samples=len(samples),
        bytes=len(stored),
        sha256=hashlib.sha256(stored).hexdigest(),
        tar_bytes=len(plain),
        tar_sha256=hashlib.sha256(plain).hexdigest(),
    )


def read_shard(path: Path) -> Iterator[ShardSample]:
    """Yields the samples of a shard in order, media and JSON side by side as ``write_shard`` leaves them."""
    with tarfile.open(path) as archive:
        media: tuple[str, str, bytes] | None = None
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None, "our shards hold files only"
            key, _, extension = member.name.partition(".")
            if extension != "json":
                media = (key, extension, file.read())
                continue
            assert media is not None, "the media stand before the JSON"
            assert media[0] == key, "one media member and one JSON per sample"
            yield ShardSample(key, media[1], media[2], json.load(file))

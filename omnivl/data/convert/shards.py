"""Writes samples into tar shards whose bytes depend only on the samples, and describes them in a manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from webdataset.writer import TarWriter

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.media import MediaKind
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError

FORMAT = "omnivl-shards"
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"

_MAX_SPLITS = 16  # each has a shard open
_SHOWN = 3  # rejections in the message of a conversion that found nothing


@dataclass(frozen=True)
class ShardSummary:
    """One finished shard: its file name, split ("" for none), number of samples, bytes and SHA-256."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """The manifest of a conversion. It has neither times nor absolute paths: the same input gives the same file.

    Attributes:
        form: The converter.
        options: Its options.
        samples: Samples written.
        kinds: Pictures and clips, as ``image`` and ``video``.
        with_caption: Samples that have a caption.
        with_label: Samples that have a label.
        captions: Captions altogether.
        splits: Samples by split; "" where none is known.
        labels: Samples by class name.
        rejected: Bad entries by cause; each is a line of ``rejected.jsonl``.
        shards: The shards in the order of their names.
    """

    form: str
    options: Mapping[str, object]
    samples: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    with_caption: int = 0
    with_label: int = 0
    captions: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    shards: list[ShardSummary] = field(default_factory=list)

    def count(self, entry: Entry, kinds: Sequence[MediaKind], split: str | None) -> None:
        """Counts a written sample whose pictures and clips are of these kinds."""
        self.samples += 1
        self.kinds.update(kinds)
        self.with_caption += bool(entry.captions)
        self.captions += len(entry.captions)
        self.splits[split or ""] += 1
        if entry.label is not None:
            self.with_label += 1
            self.labels[entry.label] += 1

    def to_json(self) -> str:
        """The manifest file's text."""
        fields = {**vars(self), "format": FORMAT, "shards": [asdict(shard) for shard in self.shards]}
        return json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


class _Hashed:
    """A file that is hashed and measured while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


class _Shard:
    """A shard that is being written."""

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.samples = 0
        self.payload = 0
        self.file = _Hashed(path.open("wb"))
        self.tar = TarWriter(self.file, user="", group="", encoder=False, mtime=0)

    def close(self) -> ShardSummary:
        self.tar.close()
        self.file.file.close()
        return ShardSummary(self.path.name, self.split, self.samples, self.file.size, self.file.digest.hexdigest())


class ShardSet:
    """Shards of one folder, a series for each split: ``train-000000.tar``, ``train-000001.tar``, ...

    Args:
        folder: An existing, empty folder.
        manifest: Gets the shards when they are closed.
        max_samples: Samples per shard.
        max_bytes: Bytes of media and JSON per shard; a sample that is larger has a shard for itself.
    """

    def __init__(self, folder: Path, manifest: Manifest, max_samples: int, max_bytes: int) -> None:
        self._folder = folder
        self._manifest = manifest
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._open: dict[str, _Shard] = {}
        self._numbers: Counter[str] = Counter()
        self.first_rejections: list[Rejection] = []
        self._rejected = (folder / REJECTED).open("w", encoding="utf-8", errors="backslashreplace")

    def write(self, key: str, files: Mapping[str, bytes], text: bytes, split: str | None, where: str) -> None:
        """Appends a sample to the current shard of its split.

        Args:
            key: Its name, not yet in these shards.
            files: Pictures and clips by what follows the key and a dot: ``jpg``, ``left.jpg``.
            text: The sample's JSON.
            split: Its split.
            where: For messages.

        Raises:
            DataError: There are too many splits, or a split's name cannot be a file name.
        """
        size = sum(len(data) for data in files.values()) + len(text)
        shard = self._shard(split or "data", split or "", size, where)
        shard.tar.write({"__key__": key, **files, "json": text})
        shard.samples += 1
        shard.payload += size

    def _shard(self, series: str, split: str, size: int, where: str) -> _Shard:
        shard = self._open.get(series)
        if shard is not None:
            if shard.samples < self._max_samples and shard.payload + size <= self._max_bytes:
                return shard
            self._manifest.shards.append(self._open.pop(series).close())
        if series not in self._numbers:
            _check_split(series, len(self._numbers), where)
        path = self._folder / f"{series}-{self._numbers[series]:06d}.tar"
        self._numbers[series] += 1
        self._open[series] = _Shard(path, split)
        return self._open[series]

    def reject(self, rejection: Rejection) -> None:
        """Counts and lists a bad entry."""
        if len(self.first_rejections) < _SHOWN:
            self.first_rejections.append(rejection)
        self._manifest.rejected[rejection.cause] += 1
        self._rejected.write(json.dumps(asdict(rejection), ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Ends all shards and writes the manifest."""
        self.abandon()
        self._manifest.shards.sort(key=lambda shard: shard.name)
        (self._folder / MANIFEST).write_text(self._manifest.to_json(), encoding="utf-8")

    def abandon(self) -> None:
        """Closes the files without a manifest."""
        self._rejected.close()
        for series in sorted(self._open):
            self._manifest.shards.append(self._open.pop(series).close())


def _check_split(series: str, known: int, where: str) -> None:
    if not series.replace("-", "").replace("_", "").isalnum():
        raise DataError(
            f"{where}: split {series!r} cannot be part of a file name; allowed: letters, digits, '-' and '_'"
        )
    if known >= _MAX_SPLITS:
        raise DataError(
            f"{where}: more than {_MAX_SPLITS} different splits, the last is {series!r}; name the column that says "
            "train, test ... as the split column, or none"
        )

"""Tar shards on a file system, read by offset."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omnivl.data.batch import is_label, is_video
from omnivl.data.config import DataEntryConfig
from omnivl.data.formats import TEXT_EXTENSIONS
from omnivl.data.index import LANGUAGES, ShardIndex, load_index
from omnivl.data.record import Record, parse_record
from omnivl.data.sources.base import BadSampleError, Cause, Rejection, Sample
from omnivl.errors import DataError

_RANGE = re.compile(r"\{([^{}]+)\}")


def expand_pattern(pattern: str) -> tuple[str, ...]:
    """Expands ``{000..127}`` and ``{a,b}``, then ``*`` and ``?``; a folder stands for its tar files. Sorted by name.

    Raises:
        DataError: Nothing matches.
    """
    paths: list[str] = []
    for text in expand_braces(pattern):
        if Path(text).is_dir():
            inside = sorted(str(path) for path in Path(text).rglob("*.tar"))
            paths += inside if inside or text == pattern else [text]  # one of several: an unreadable shard
        elif glob.has_magic(text):
            paths += sorted(glob.glob(text))  # noqa: PTH207  # Path.glob takes no absolute patterns
        else:
            paths.append(text)
    if not paths:
        raise DataError(
            f"data source {pattern!r}: no shard matches; allowed: a .tar file, a folder with .tar files, a glob or a "
            f"brace pattern such as data/{{000..127}}.tar; the working folder is {Path.cwd()}"
        )
    return tuple(paths)


def expand_braces(pattern: str) -> list[str]:
    """Expands ``{000..127}`` and ``{a,b}``; anything else stays as it is."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for choice in choices for expanded in expand_braces(f"{head}{choice}{tail}")]


def _index_path(shard: str, folder: str | None) -> Path:
    if folder is None:
        return Path(f"{shard}.index.safetensors")
    digest = blake2b(os.path.abspath(shard).encode(), digest_size=8).hexdigest()  # noqa: PTH100  # no link followed
    return Path(folder) / f"{Path(shard).stem}-{digest}.safetensors"


class ShardSource:
    """The samples of some shards that an entry asks for.

    A sample with a label but no caption is no sample of a caption kind, and the other way round; one with neither is
    bad. Stills belong to the image kinds, clips and animated pictures to the video kinds.
    """

    def __init__(
        self,
        config: DataEntryConfig,
        shards: Sequence[str],
        *,
        index_folder: str | None = None,
        keep_index: bool = True,
    ) -> None:
        """Indexes the shards.

        Args:
            config: Kind, ``where`` and language are used.
            shards: Paths of tar files.
            index_folder: Folder for indexes; None for beside each shard.
            keep_index: Whether indexes are kept at all.

        Raises:
            DataError: No sample is left, with what was found instead.
        """
        self._config = config
        self._shards = tuple(shards)
        with ThreadPoolExecutor(8) as pool:
            indexes = list(
                pool.map(
                    lambda shard: load_index(
                        Path(shard), shard, _index_path(shard, index_folder) if keep_index else None
                    ),
                    self._shards,
                )
            )
        self._rejections = [rejection for index in indexes for rejection in index.rejections]
        chosen = [self._choose(index, shard) for index, shard in zip(indexes, self._shards, strict=True)]
        self._indexes = indexes
        self._shard = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(rows) for rows in chosen])
        self._row = np.concatenate(chosen).astype(np.int32)
        used = {indexes[shard].labels[row] for shard, row in zip(self._shard.tolist(), self._row.tolist(), strict=True)}
        self._classes = tuple(sorted(used - {""}))
        self._open: dict[int, int] = {}
        self._owner = os.getpid()
        if len(self._row) == 0:
            raise DataError(self._nothing_left())

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted names of the labels of the samples in the list."""
        return self._classes

    @property
    def rejections(self) -> Sequence[Rejection]:
        """What the indexes found bad."""
        return self._rejections

    @property
    def num_shards(self) -> int:
        """Number of tar files."""
        return len(self._shards)

    def __len__(self) -> int:
        return len(self._row)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def read(self, index: int) -> Sample:
        """The sample at ``index``.

        Raises:
            BadSampleError: The shard cannot be read any more, or has changed.
        """
        shard, row = int(self._shard[index]), int(self._row[index])
        columns = self._indexes[shard]
        key = columns.keys[row]
        where = f"{self._shards[shard]}:{key}"
        descriptor = self._descriptor(shard, where)
        members = {
            extension: _read_span(descriptor, int(offset), int(size), where)
            for extension, (offset, size) in zip(TEXT_EXTENSIONS, columns.text[row], strict=True)
            if size >= 0
        }
        offset, size = columns.media[row]
        record = parse_record(members, where)
        return to_sample(
            record,
            key=key,
            where=where,
            media=_read_span(descriptor, int(offset), int(size), where),
            extension=columns.extension[row],
            language=self._config.language,
        )

    def _descriptor(self, shard: int, where: str) -> int:
        """The shard's file descriptor in this process; ``pread`` needs no file position, so threads can share it."""
        if self._owner != os.getpid():
            self._open, self._owner = {}, os.getpid()
        if shard not in self._open:
            if len(self._open) >= 256:  # far below the usual limit of 1024 open files
                os.close(self._open.pop(next(iter(self._open))))
            try:
                self._open[shard] = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise BadSampleError("unreadable_path", where, error.strerror or str(error)) from error
        return self._open[shard]

    def _choose(self, index: ShardIndex, shard: str) -> NDArray[np.int64]:
        """Rows of one shard that the entry asks for; notes those that have neither caption nor label."""
        config = self._config
        keep = index.is_clip == is_video(config.kind)
        for name, allowed in config.where.items():
            keep &= _matches(index, name, allowed, shard)
        has_label = np.array([label != "" for label in index.labels], dtype=np.bool_)
        has_caption = _matches(index, LANGUAGES, (config.language, ""), shard)
        any_caption = _matches(index, LANGUAGES, None, shard)
        cause: Cause = "missing_label" if is_label(config.kind) else "missing_caption"
        for row in np.flatnonzero(keep & ~has_label & ~any_caption):
            detail = "the sample has neither a caption nor a label"
            self._rejections.append(Rejection(cause, f"{shard}:{index.keys[row]}", detail))
        return np.flatnonzero(keep & (has_label if is_label(config.kind) else has_caption))

    def _nothing_left(self) -> str:
        config = self._config
        clips = sum(int(index.is_clip.sum()) for index in self._indexes)
        total = sum(len(index) for index in self._indexes)
        causes = Counter(rejection.cause for rejection in self._rejections)
        fields = sorted({name for index in self._indexes for name in index.fields if not name.startswith("@")})
        wanted = ", ".join(f"{name} in {list(values)}" for name, values in config.where.items()) or "no filter"
        return (
            f"data source {config.source!r}: no sample of kind {config.kind} is left (where: {wanted}); its "
            f"{len(self._shards)} shards hold {total - clips} stills and {clips} clips, metadata fields "
            f"{fields}, rejected {dict(causes)}; change the kind, 'where' or the path"
        )


def to_sample(record: Record, *, key: str, where: str, media: bytes, extension: str, language: str) -> Sample:
    """Puts a sample's text and media together."""
    return Sample(
        key=key,
        where=where,
        media=media,
        extension=extension,
        captions=record.captions_in(language),
        label=record.label,
        identity=record.identity,
        meta=record.meta,
    )


def value_matches(value: object, allowed: tuple[str, ...] | None) -> bool:
    """Whether a metadata value is among ``allowed``; of a list, whether one of its entries is. None allows anything."""
    if isinstance(value, list):
        return any(value_matches(entry, allowed) for entry in value)
    return allowed is None or (value if isinstance(value, str) else json.dumps(value)) in allowed


def _matches(index: ShardIndex, name: str, allowed: tuple[str, ...] | None, shard: str) -> NDArray[np.bool_]:
    if len(index) and name not in index.fields and name.startswith("@") is False:
        return np.zeros(len(index), dtype=np.bool_)
    values, codes = index.fields.get(name, ((), np.full(len(index), -1, dtype=np.int32)))
    table = np.array([value_matches(json.loads(value), allowed) for value in values] + [False], dtype=np.bool_)
    return table[codes]  # code -1 reads the appended False


def _read_span(descriptor: int, offset: int, size: int, where: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except OSError as error:
        raise BadSampleError("unreadable_path", where, error.strerror or str(error)) from error
    if len(data) != size:
        raise BadSampleError("truncated_tar", where, f"{len(data)} of {size} bytes are there: the shard has changed")
    return data


def matches(meta: Mapping[str, object], where: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a sample's metadata passes a filter. For sources that have no index."""
    return all(name in meta and value_matches(meta[name], allowed) for name, allowed in where.items())

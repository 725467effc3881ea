"""Tar shards on a file system, read by offset."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omnivl.data.batch import has_text, has_visual, is_label, is_video
from omnivl.data.config import DataEntryConfig
from omnivl.data.filters import rows_that_match
from omnivl.data.formats import TEXT_EXTENSIONS, file_named
from omnivl.data.index import LANGUAGES, ShardIndex
from omnivl.data.index_file import load_index
from omnivl.data.record import Record, parse_record
from omnivl.data.sources.base import SHARD_CAUSES, BadSampleError, Cause, NothingLeftError, Rejection, Sample
from omnivl.data.sources.open_shards import OpenShards
from omnivl.errors import DataError

_SHOWN_NAMES = 12


def index_path(shard: str, folder: str | None) -> Path:
    """The file of a shard's index: beside the shard where ``folder`` is None."""
    if folder is None:
        return Path(f"{shard}.index.safetensors")
    digest = blake2b(os.fsencode(os.path.abspath(shard)), digest_size=8).hexdigest()  # noqa: PTH100  # no link followed
    return Path(folder) / f"{Path(shard).stem}-{digest}.safetensors"


class ShardSource:
    """The samples of some shards that an entry asks for.

    Caption kinds skip samples with a label but no caption, and label kinds those with a caption but no label; a sample
    with neither is bad. Stills belong to the image kinds, clips and animated pictures to the video kinds. A sample that
    lacks all the files that the entry names as its pictures is skipped; one that lacks some is bad.
    """

    def __init__(
        self,
        config: DataEntryConfig,
        shards: Sequence[str],
        *,
        index_folder: str | None = None,
        keep_index: bool = True,
        indexes: Sequence[ShardIndex] | None = None,
    ) -> None:
        """Indexes the shards.

        Args:
            config: Kind, ``where`` and language are used.
            shards: Paths of tar files.
            index_folder: Folder for indexes; None for beside each shard.
            keep_index: Whether indexes are kept at all.
            indexes: The shards' indexes where they are known, maybe of their first samples only.

        Raises:
            DataError: No sample is left; the message says what the shards hold.
        """
        self._config = config
        self._takes_media, self._wanted = takes_media(config), wanted_members(config)
        self._shards = tuple(shards)
        if indexes is None:
            with ThreadPoolExecutor(8) as pool:
                indexes = list(
                    pool.map(
                        lambda shard: load_index(
                            Path(shard), shard, index_path(shard, index_folder) if keep_index else None
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
        self._sizes = np.concatenate([index.sizes[rows] for index, rows in zip(indexes, chosen, strict=True)])
        self._open = OpenShards()
        if len(self._row) == 0:
            raise self._nothing_left()

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

    def picture_sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """See ``Measured``. Of further files, which the entry names as its pictures, no size is known."""
        if self._config.pictures:
            return np.zeros((len(indices), 2), dtype=np.int64)
        return self._sizes[indices].astype(np.int64)

    def __len__(self) -> int:
        return len(self._row)

    def close(self) -> None:
        """Closes the shards; those that are read after this are opened again."""
        self._open.close()

    def read(self, index: int) -> Sample:
        """The sample at ``index``.

        Raises:
            BadSampleError: The shard cannot be read any more, or has changed.
        """
        shard, row = int(self._shard[index]), int(self._row[index])
        columns = self._indexes[shard]
        key = columns.keys[row]
        where = f"{self._shards[shard]}:{key}"
        try:
            opened = self._open.get(self._shards[shard])
        except OSError as error:
            raise BadSampleError("unreadable_path", where, error.strerror or str(error)) from error
        members = {
            extension: _read_span(opened.descriptor, offset, size, where)
            for extension, (offset, size) in zip(TEXT_EXTENSIONS, columns.text[row].tolist(), strict=True)
            if size >= 0
        }
        record = parse_record(members, where)
        media = None
        if self._takes_media:
            offset, size = columns.media[row].tolist()
            media = _read_span(opened.descriptor, offset, size, where)
        spans = columns.members_of(row) if self._wanted else {}
        named = (name for one in self._wanted if (name := file_named(one, spans)) is not None)
        return to_sample(
            record,
            key=key,
            where=where,
            media=media,
            extension=columns.extension[row],
            language=self._config.language,
            members={name: _read_span(opened.descriptor, *spans[name], where) for name in named},
        )

    def _choose(self, index: ShardIndex, shard: str) -> NDArray[np.int64]:
        """Rows of one shard that the entry asks for; records those that have neither caption nor label as bad."""
        config = self._config
        keep = np.ones(len(index), dtype=np.bool_)
        for name, allowed in config.where.items():
            keep &= rows_that_match(index.fields, len(index), name, allowed, shard)
        keep &= self._shows(index, keep, shard)
        if config.text is not None or not has_text(config.kind):
            return np.flatnonzero(keep)  # a text in another field is checked when the sample is read
        has_label = np.array([label != "" for label in index.labels], dtype=np.bool_)
        has_caption = rows_that_match(index.fields, len(index), LANGUAGES, (config.language, ""), shard)
        any_caption = rows_that_match(index.fields, len(index), LANGUAGES, None, shard)
        cause: Cause = "missing_label" if is_label(config.kind) else "missing_caption"
        for row in np.flatnonzero(keep & ~has_label & ~any_caption):
            detail = "the sample has neither a caption nor a label"
            self._rejections.append(Rejection(cause, f"{shard}:{index.keys[row]}", detail))
        return np.flatnonzero(keep & (has_label if is_label(config.kind) else has_caption))

    def _shows(self, index: ShardIndex, keep: NDArray[np.bool_], shard: str) -> NDArray[np.bool_]:
        """Rows of one shard with the pictures that the entry asks for; records those of ``keep`` that lack some."""
        config = self._config
        if config.pictures:
            present = np.stack([index.has_member(name) for name in config.pictures])
            enough: NDArray[np.bool_] = present.sum(axis=0) >= config.needed_pictures
            for row in np.flatnonzero(keep & present.any(axis=0) & ~enough).tolist():
                own = [name for name, has in zip(config.pictures, present[:, row].tolist(), strict=True) if has]
                self._rejections.append(lacking(config, own, f"{shard}:{index.keys[row]}").rejection)
            return enough
        if not has_visual(config.kind):
            return np.ones(len(index), dtype=np.bool_)
        has_media = index.media[:, 1] >= 0
        self._rejections += [index.without_media(row, shard) for row in np.flatnonzero(~has_media).tolist()]
        shows: NDArray[np.bool_] = has_media & (index.is_clip == is_video(config.kind))
        return shows

    def _nothing_left(self) -> DataError:
        config = self._config
        unread = [entry for entry in self._rejections if entry.cause in SHARD_CAUSES]
        if len(unread) == len(self._shards):
            return DataError(
                f"data source {config.source!r}: none of its {len(self._shards)} shards can be read; the first: "
                f"{unread[0].where}: {unread[0].detail}; the working folder is {Path.cwd()}; mend them, or name others"
            )
        clips = sum(int(index.is_clip.sum()) for index in self._indexes)
        total = sum(int((index.media[:, 1] >= 0).sum()) for index in self._indexes)
        files = sorted({name for index in self._indexes for name in index.member_names})[:_SHOWN_NAMES]
        further = f", further files {files}" if files else ""
        causes = Counter(rejection.cause for rejection in self._rejections)
        fields = sorted({name for index in self._indexes for name in index.fields.columns if not name.startswith("@")})
        more = f" and {len(fields) - _SHOWN_NAMES} more" if len(fields) > _SHOWN_NAMES else ""
        wanted = ", ".join(f"{name} in {list(values)}" for name, values in config.where.items()) or "no filter"
        wanted += f"; pictures: {', '.join(config.pictures)}" if config.pictures else ""
        first = next(iter(unread or self._rejections), None)
        example = "" if first is None else f" (the first: {first.where}: {first.detail})"
        return NothingLeftError(
            f"data source {config.source!r}: no sample of kind {config.kind} is left (where: {wanted}); its "
            f"{len(self._shards)} shards hold {total - clips} stills and {clips} clips{further}, metadata fields "
            f"{fields[:_SHOWN_NAMES]}{more}, rejected {dict(causes)}{example}; change the kind, 'where' or the path"
        )


def takes_media(config: DataEntryConfig) -> bool:
    """Whether an entry reads the picture or clip that has the sample's own name."""
    return has_visual(config.kind) and not config.pictures


def wanted_members(config: DataEntryConfig) -> tuple[str, ...]:
    """The further files of a sample that an entry reads: pictures and masks."""
    return (*config.pictures, *config.field_files)


def lacking(config: DataEntryConfig, present: Sequence[str], where: str) -> BadSampleError:
    """What is wrong with a sample that has only some of the pictures that an entry names."""
    missing = [name for name in config.pictures if name not in present]
    detail = f"no {', '.join(missing)}; wanted: {config.needed_pictures} of {', '.join(config.pictures)}"
    return BadSampleError("missing_media", where, detail)


def to_sample(
    record: Record,
    *,
    key: str,
    where: str,
    media: bytes | None,
    extension: str,
    language: str,
    members: Mapping[str, bytes],
) -> Sample:
    """Makes a sample from its text and media."""
    return Sample(
        key=key,
        where=where,
        media=media,
        extension=extension,
        captions=record.captions_in(language),
        label=record.label,
        identity=record.identity,
        meta=record.meta,
        members=members,
    )


def _read_span(descriptor: int, offset: int, size: int, where: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except OSError as error:
        raise BadSampleError("unreadable_path", where, error.strerror or str(error)) from error
    if len(data) != size:
        raise BadSampleError("truncated_tar", where, f"{len(data)} of {size} bytes are there: the shard has changed")
    return data

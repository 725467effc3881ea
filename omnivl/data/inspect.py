"""Counts what a data source holds, without training on it.

Text is counted for every sample, headers of pictures and clips for a bounded number of samples spread evenly, and a few
samples are decoded to be looked at.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omnivl.data.batch import DATA_KINDS, is_video
from omnivl.data.config import DataEntryConfig
from omnivl.data.formats import TEXT_EXTENSIONS
from omnivl.data.index import ShardIndex
from omnivl.data.index_file import load_index
from omnivl.data.inspect_media import MediaFacts, has_media, media_facts
from omnivl.data.record import parse_record
from omnivl.data.sources import is_stream, open_source
from omnivl.data.sources.base import SHARD_CAUSES, BadSampleError, Rejection, Sample
from omnivl.data.sources.emoji import EMBEDDED, embedded_shards
from omnivl.data.sources.generated import GENERATED
from omnivl.data.sources.patterns import expand_pattern
from omnivl.data.sources.presence import unreadable_shards, why_unreadable
from omnivl.errors import DataError

_MAX_VALUES = 24  # metadata fields with more distinct values get no table
_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class ShardCounts:
    """Counts of one shard: ``bytes`` is its size on disk. A sample that is neither still nor clip has other files."""

    name: str
    bytes: int
    samples: int
    stills: int
    clips: int
    rejected: int


@dataclass
class Inspection:
    """The result of an inspection. All counters are by sample unless they say otherwise.

    Attributes:
        source: As given.
        shards: One entry per shard; none for generated sources.
        samples: Samples whose headers are good.
        counted: Samples whose text was counted: all of them, but for generated sources.
        bytes: Size of all shards.
        kinds: How many samples each data kind would have, where an entry names neither texts nor pictures.
        extensions: Samples by file extension.
        captions: Captions in all languages.
        languages: Captions by language; "" where none is named.
        caption_words: Captions by their number of words.
        labels: Samples by class name.
        fields: Samples by value, for metadata fields with few values (split, style ...).
        field_types: Samples by type of the value, for all metadata fields.
        members: Samples by further picture or clip: ``left.png`` for ``KEY.left.png``.
        scanned: Samples whose media header was read.
        sizes: Scanned samples by ``WIDTHxHEIGHT``.
        frames: Scanned clips by number of frames.
        seconds: Scanned clips by duration, rounded to a tenth of a second.
        num_repeated_keys: Keys that more than one shard has.
        repeated_keys: The most frequent of them with the number of their samples.
        rejected: Bad samples by cause.
        rejections: The first of them.
        no_shards: Why files that gave no sample at all are no shards.
        shown: Samples to look at.
    """

    source: str
    shards: list[ShardCounts] = field(default_factory=list)
    samples: int = 0
    counted: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    caption_words: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    field_types: dict[str, Counter[str]] = field(default_factory=dict)
    members: Counter[str] = field(default_factory=Counter)
    scanned: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)
    num_repeated_keys: int = 0
    repeated_keys: dict[str, int] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    rejections: list[Rejection] = field(default_factory=list)
    no_shards: list[Rejection] = field(default_factory=list)
    shown: list[Sample] = field(default_factory=list)

    def reject(self, rejection: Rejection) -> None:
        """Counts a bad sample and keeps the first ones."""
        self.rejected[rejection.cause] += 1
        if len(self.rejections) < _MAX_EXAMPLES:
            self.rejections.append(rejection)

    def to_json(self) -> str:
        """All counts, without the samples to look at."""
        fields = {name: value for name, value in vars(self).items() if name != "shown"}
        fields["shards"] = [vars(shard) for shard in self.shards]
        for name in ("rejections", "no_shards"):
            fields[name] = [vars(rejection) for rejection in fields[name]]
        return json.dumps(fields, ensure_ascii=False, indent=1)


def inspect_source(source: str, *, samples: int = 48, scan: int = 2000) -> Inspection:
    """Counts a source.

    Args:
        source: Path, folder, glob or brace pattern of tar shards; ``emoji``, ``emoji_hands``, ``motion`` or
            ``questions``.
        samples: Number of samples to show.
        scan: Number of samples whose media header is read.

    Raises:
        DataError: The source does not exist or is a stream, or a number is negative.
    """
    if samples < 0 or scan < 0:
        raise DataError(f"samples is {samples} and scan {scan}; allowed: 0 or more")
    if is_stream(source):
        raise DataError(f"{source}: a stream cannot be inspected; copy some of its shards to a disk and name them")
    if source in GENERATED:
        return _inspect_generated(source, samples, scan)
    shards = embedded_shards(source) if source in EMBEDDED else expand_pattern(source)
    missing = [(shard, why_unreadable(shard) or "") for shard in shards if not Path(shard).is_file()]
    if missing:
        raise unreadable_shards(source, missing, len(shards))
    return _inspect_shards(source, shards, samples, scan)


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` different places among ``total``, the middles of equal segments."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _inspect_shards(source: str, shards: Sequence[str], samples: int, scan: int) -> Inspection:
    found = Inspection(source)
    key_hashes: Counter[int] = Counter()
    indexes: list[ShardIndex] = []
    for shard in shards:
        index = load_index(Path(shard), shard, cache=None)
        indexes.append(index)
        clips, media = int(index.is_clip.sum()), int((index.media[:, 1] >= 0).sum())
        name = os.path.relpath(shard, Path(shards[0]).parent)
        size = Path(shard).stat().st_size
        found.shards.append(ShardCounts(name, size, len(index), media - clips, clips, len(index.rejections)))
        found.bytes += size
        found.extensions.update(name for name in index.extension if name)
        found.members.update(index.member_names[number] for number in index.members[:, 1].tolist())
        for row in range(len(index)):
            if index.media[row, 1] < 0 and index.extension[row] and not index.members_of(row):
                found.reject(index.without_media(row, shard))
        key_hashes.update(hash(key) for key in index.keys)
        for rejection in index.rejections:
            found.reject(rejection)
            if rejection.cause in SHARD_CAUSES and not len(index):
                found.no_shards.append(rejection)
    found.samples = sum(len(index) for index in indexes)
    repeated = {value for value, count in key_hashes.items() if count > 1}
    if repeated:
        keys = Counter(key for index in indexes for key in index.keys if hash(key) in repeated)
        found.num_repeated_keys = sum(count > 1 for count in keys.values())
        found.repeated_keys = {key: count for key, count in keys.most_common(_MAX_EXAMPLES) if count > 1}
    scanned, shown = set(spread(found.samples, scan)), set(spread(found.samples, samples))
    place = 0
    for shard, index in zip(shards, indexes, strict=True):
        for row, sample in enumerate(_read_samples(shard, index, scanned | shown, place, found)):
            has_media, is_clip = index.media[row, 1] >= 0, bool(index.is_clip[row])
            _count_text(found, sample, ("video" if is_clip else "image") if has_media else None)
            _look_at_media(found, sample, place in scanned, place in shown)
            place += 1
    _drop_wide_fields(found)
    return found


def _read_samples(
    shard: str, index: ShardIndex, with_media: set[int], first: int, found: Inspection
) -> Iterator[Sample]:
    """All samples of a shard in order; only those whose index is in ``with_media`` have their bytes."""
    with Path(shard).open("rb") as file:
        for row, key in enumerate(index.keys):
            spans = zip(TEXT_EXTENSIONS, index.text[row].tolist(), strict=True)
            members = {name: os.pread(file.fileno(), size, offset) for name, (offset, size) in spans if size >= 0}
            record = parse_record(members, f"{shard}:{key}")
            (offset, size), extension = index.media[row].tolist(), index.extension[row]
            if size < 0:  # the sample's first further file is taken instead
                others = index.members_of(row)
                extension, (offset, size) = next(iter(others.items()), ("", (0, -1)))
                extension = extension.rpartition(".")[2]
            media = os.pread(file.fileno(), size, offset) if size >= 0 and first + row in with_media else None
            captions = tuple(text for texts in record.captions.values() for text in texts)
            found.languages.update({language: len(texts) for language, texts in record.captions.items()})
            yield Sample(
                key=key,
                where=f"{shard}:{key}",
                media=media,
                extension=extension,
                captions=captions,
                label=record.label,
                identity=record.identity,
                meta=record.meta,
            )


def _inspect_generated(source: str, samples: int, scan: int) -> Inspection:
    """Inspects a source that generates its samples; it generates only those that are scanned or shown."""
    found = Inspection(source)
    kind = GENERATED[source][0]
    opened = open_source(DataEntryConfig(source=source, kind=kind), seed=0)
    found.samples = len(opened)
    shown = set(spread(len(opened), samples))
    scanned = set(spread(len(opened), min(scan, 4 * samples)))
    for place in sorted(scanned | shown):
        sample = opened.read(place)
        _count_text(found, sample, "video" if is_video(kind) else "image")
        _look_at_media(found, sample, place in scanned, place in shown)
    _drop_wide_fields(found)
    return found


def _count_text(found: Inspection, sample: Sample, medium: Literal["image", "video"] | None) -> None:
    found.counted += 1
    found.captions += len(sample.captions)
    found.caption_words.update(len(caption.split()) for caption in sample.captions)
    has = {medium or "": True, "text": bool(sample.captions), f"{medium}_text": bool(sample.captions)}
    has[f"{medium}_label"] = sample.label is not None
    found.kinds.update(kind for kind in DATA_KINDS if has.get(kind))
    if sample.label is not None:
        found.labels[sample.label] += 1
    for name, value in sample.meta.items():
        found.field_types.setdefault(name, Counter())[json_type(value)] += 1
        if name != "label" and isinstance(value, str | int | bool):
            counter = found.fields.setdefault(name, Counter())
            if len(counter) <= _MAX_VALUES:
                counter[str(value)] += 1


def json_type(value: object) -> str:
    """The type of a JSON value in words."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "number"
        case list():
            inner = {json_type(one) for one in value}
            return f"list of {inner.pop()}s" if len(inner) == 1 and inner <= {"text", "number", "object"} else "list"
        case _:
            return "object"


def _look_at_media(found: Inspection, sample: Sample, scan: bool, show: bool) -> None:
    """Reads the media's header, and keeps the sample if it is one to show."""
    if scan and has_media(sample):
        found.scanned += 1
        try:
            _count_media(found, media_facts(sample))
        except BadSampleError as error:
            found.reject(error.rejection)
    if show:
        found.shown.append(sample)


def _count_media(found: Inspection, facts: MediaFacts) -> None:
    found.sizes[f"{facts.width}x{facts.height}"] += 1
    if facts.frames is not None:
        found.frames[facts.frames] += 1
    if facts.seconds is not None:
        found.seconds[round(facts.seconds, 1)] += 1


def _drop_wide_fields(found: Inspection) -> None:
    found.fields = {name: counter for name, counter in found.fields.items() if len(counter) <= _MAX_VALUES}

"""Shards that can only be read from front to back: pipes and object stores.

Shards come in a shuffled order, distributed over all readers (replicas x workers); samples are shuffled in a buffer. A
stream has no list of samples, so that a run resumes at a shard, not at a sample, and another number of readers gets
another distribution of shards: samples of partly read shards are seen again. Loaders warn about this once.

Only webdataset's raw iteration over tar members is used: its decoders, which could unpickle, are never reached.
"""

import warnings
from collections.abc import Iterator

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from omnivl.data.batch import has_text, is_label, is_video
from omnivl.data.config import DataEntryConfig
from omnivl.data.formats import CLIP_EXTENSIONS, MEDIA_EXTENSIONS, TEXT_EXTENSIONS, file_named, is_animated
from omnivl.data.index import split_name
from omnivl.data.order import Order
from omnivl.data.record import parse_record
from omnivl.data.sources.base import BadSampleError, Cause, Rejection, Sample
from omnivl.data.sources.patterns import expand_braces
from omnivl.data.sources.shards import lacking, matches, takes_media, to_sample, wanted_members
from omnivl.errors import DataError
from omnivl.randomness import generator

_MAX_FRUITLESS_SHARDS = 64


def expand_stream(source: str) -> tuple[str, ...]:
    """The shards of a stream pattern; ``s3://`` is read by the ``aws`` command."""
    shards = expand_braces(source)
    return tuple(f"pipe:aws s3 cp {shard} -" if shard.startswith("s3://") else shard for shard in shards)


class StreamReader:
    """One reader's endless sequence of samples."""

    def __init__(
        self,
        config: DataEntryConfig,
        *,
        key: str,
        seed: int,
        buffer: int,
        reader: int,
        readers: int,
        first_shard: int,
    ) -> None:
        """Describes a reader; opens nothing.

        Args:
            config: The entry.
            key: Its name in random keys.
            seed: The stage's seed.
            buffer: Samples that are shuffled among each other.
            reader: This reader's number.
            readers: Readers in all replicas and workers.
            first_shard: Place in the endless order of shards to begin at, equal for all readers.
        """
        self._config, self._key, self._seed, self._buffer_size = config, key, seed, max(1, buffer)
        self._shards = expand_stream(config.source)
        self._order = Order(len(self._shards), seed, key, "shards")
        self._place, self._step = first_shard + reader, readers
        self._random = generator(seed, key, "stream", reader, first_shard)
        self._buffer: list[tuple[int, Sample]] = []
        self._samples = self._read()
        self.rejections: list[Rejection] = []

    @property
    def shard(self) -> int:
        """Where to resume: the earliest shard in the endless order with a sample that has not been returned."""
        return min((place for place, _ in self._buffer), default=self._place)

    def next(self) -> Sample:
        """The next sample, taken at random from the buffer, which is refilled.

        Raises:
            DataError: Shard after shard holds no sample of this kind.
        """
        while len(self._buffer) < self._buffer_size:
            sample = next(self._samples)
            self._buffer.append((self._place, sample))
        place = int(self._random.integers(len(self._buffer)))
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()[1]

    def _read(self) -> Iterator[Sample]:
        fruitless = 0
        while True:
            shard = self._shards[self._order(self._place)[1]]
            count = 0
            for sample in self._read_shard(shard):
                count += 1
                yield sample
            fruitless = 0 if count else fruitless + 1
            if fruitless >= min(_MAX_FRUITLESS_SHARDS, 2 * len(self._shards)):
                last = self.rejections[-1].detail if self.rejections else "no sample passes the filter"
                raise DataError(
                    f"data source {self._config.source!r}: {fruitless} shards in a row gave no sample of kind "
                    f"{self._config.kind}; the last one: {last}"
                )
            self._place += self._step

    def _read_shard(self, shard: str) -> Iterator[Sample]:
        try:
            with gopen(shard, "rb") as stream:
                members = tar_file_expander(iter([{"url": shard, "stream": stream}]))
                for group in group_by_keys(members, keys=split_name):
                    sample = self._to_sample(group, shard)
                    if sample is not None:
                        yield sample
        except Exception as error:  # tarfile, curl and the shell raise many errors; each makes this shard fail
            self.rejections.append(Rejection("truncated_tar", shard, f"{type(error).__name__}: {error.args[:1]}"))

    def _to_sample(self, group: dict[str, object], shard: str) -> Sample | None:
        """A sample if the entry asks for it; records bad ones."""
        key = str(group["__key__"])
        where = f"{shard}:{key}"
        data = {name: value for name, value in group.items() if isinstance(value, bytes)}
        extension = next((name for name in data if name in MEDIA_EXTENSIONS), "")
        config = self._config
        try:
            if takes_media(config) and not extension:
                raise BadSampleError("missing_media", where, f"the sample has only {', '.join(sorted(data))}")
            record = parse_record({name: value for name, value in data.items() if name in TEXT_EXTENSIONS}, where)
            pictures = [name for name in config.pictures if file_named(name, data) is not None]
            named = (name for one in wanted_members(config) if (name := file_named(one, data)) is not None)
            if pictures and len(pictures) < config.needed_pictures:
                raise lacking(config, pictures, where)
            sample = to_sample(
                record,
                key=key,
                where=where,
                media=data.get(extension) if takes_media(config) else None,
                extension=extension,
                language=config.language,
                members={name: data[name] for name in named},
            )
            if self._reads_captions and not sample.captions and sample.label is None:
                cause_missing: Cause = "missing_label" if is_label(config.kind) else "missing_caption"
                raise BadSampleError(cause_missing, where, "the sample has neither a caption nor a label")
        except BadSampleError as error:
            self.rejections.append(error.rejection)
            return None
        return sample if self._shows(sample, pictures) and self._says(sample) else None

    @property
    def _reads_captions(self) -> bool:
        """Whether a sample needs a caption or a label; a text in another field is checked later."""
        return has_text(self._config.kind) and self._config.text is None

    def _shows(self, sample: Sample, pictures: list[str]) -> bool:
        """Whether a sample shows what the entry asks for."""
        if not takes_media(self._config):
            return bool(pictures) or not self._config.pictures
        assert sample.media is not None, "looked at before"
        is_clip = sample.extension in CLIP_EXTENSIONS or is_animated(sample.media)
        return is_clip == is_video(self._config.kind)

    def _says(self, sample: Sample) -> bool:
        """Whether a sample has the caption or the label that the entry asks for, and passes its filter."""
        has = sample.label is not None if is_label(self._config.kind) else bool(sample.captions)
        return (has or not self._reads_captions) and matches(sample.meta, self._config.where)


def announce(config: DataEntryConfig) -> None:
    """Warns that a stream resumes at a shard."""
    warnings.warn(
        f"data source {config.source!r} is a stream: it is shuffled in a buffer instead of fully, and resumes by shard "
        f"instead of by sample",
        stacklevel=3,
    )

"""Shards that can only be read from front to back: pipes and object stores.

Shards come in a shuffled order, distributed over all readers (replicas x workers); samples are shuffled in a buffer. A
stream has no list of samples, so that a run resumes at a shard, not at a sample, and another number of readers gets
another distribution of shards: samples of partly read shards are seen again. Loaders warn about this once.

An archive is read by the reader that also makes indexes (``omnivl.data.archive``): a stream has the samples of a list,
and refuses the same ones. Nothing is unpickled.
"""

import time
import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace
from inspect import GEN_RUNNING, getgeneratorstate

from omnivl.data.archive import MAX_MEMBER_BYTES, ArchiveError, Member, TarReader, matters
from omnivl.data.batch import has_text, is_label, is_video
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.filters import matches
from omnivl.data.formats import file_named, is_clip
from omnivl.data.groups import Group, group_members, lacking_media
from omnivl.data.order import Order
from omnivl.data.record import parse_record
from omnivl.data.sources.base import SHARD_CAUSES, BadSampleError, Cause, Rejection, Sample
from omnivl.data.sources.braces import expand_braces
from omnivl.data.sources.opening import SilentStreamError, check_address, opened_stream
from omnivl.data.sources.shards import lacking, takes_media, to_sample, wanted_members
from omnivl.errors import DataError
from omnivl.randomness import generator

_MAX_FRUITLESS_SHARDS = 64
_MAX_SILENT_SHARDS = 2  # in a row; each has cost the whole time limit


def expand_stream(source: str) -> tuple[str, ...]:
    """The addresses of a stream pattern.

    Raises:
        DataError: One of them is no address, or there are too many.
    """
    shards = tuple(expand_braces(source))
    for shard in shards:
        check_address(shard)
    return shards


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
        timeout: float = LoaderConfig.stream_timeout_seconds,
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
            timeout: Seconds that a shard may send nothing.
        """
        self._config, self._key, self._seed, self._buffer_size = config, key, seed, max(1, buffer)
        self._timeout, self._silent = timeout, 0
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

    def close(self) -> None:
        """Ends the program that sends the present shard, if there is one; no sample can be read after that.

        While another thread reads it, nothing is done.
        """
        if getgeneratorstate(self._samples) != GEN_RUNNING:
            self._samples.close()

    def next(self) -> Sample:
        """The next sample, taken at random from the buffer, which is refilled.

        Raises:
            DataError: Shard after shard holds no sample of this kind, or sends nothing.
        """
        while len(self._buffer) < self._buffer_size:
            sample = next(self._samples)
            self._buffer.append((self._place, sample))
        place = int(self._random.integers(len(self._buffer)))
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()[1]

    def _read(self) -> Generator[Sample, None, None]:
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

    def first(self, seconds: float) -> Sample | None:
        """The first sample of the pattern's first shard; None where it has none, see ``rejections``.

        Args:
            seconds: After which the shard is given up.
        """
        return next(self._read_shard(self._shards[0], seconds), None)

    def _read_shard(self, shard: str, seconds: float | None = None) -> Iterator[Sample]:
        try:
            with opened_stream(shard, self._timeout, seconds) as stream:
                for group in group_members(_with_bytes(TarReader(stream))):
                    sample = self._to_sample(group, shard)
                    if sample is not None:
                        yield sample
            self._silent = 0
        except SilentStreamError as error:
            self._give_up(shard, error)
        except ArchiveError as error:
            self._silent = 0
            self.rejections.append(Rejection(error.cause, shard, error.detail))

    def _give_up(self, shard: str, error: SilentStreamError) -> None:
        """Records a shard that sends nothing.

        Raises:
            DataError: The one before did not either.
        """
        self.rejections.append(Rejection(error.cause, shard, error.detail))
        self._silent += 1
        if self._silent >= _MAX_SILENT_SHARDS:
            raise DataError(
                f"data source {self._config.source!r}: {self._silent} shards in a row sent nothing any more; the last "
                f"one: {shard}: {error.detail}; see whether what sends it still runs and can be reached, or raise "
                "loader.stream_timeout_seconds"
            ) from error

    def _to_sample(self, group: Group[bytes], shard: str) -> Sample | None:
        """A sample if the entry asks for it; records bad ones."""
        where = f"{shard}:{group.key}"
        media, extension = group.media or (None, group.unknown)
        config = self._config
        try:
            if group.problem is not None:
                raise BadSampleError(group.problem[0], where, group.problem[1])
            record = parse_record(group.text, where)
            if takes_media(config) and media is None:
                raise lacking_media(extension, group.text, where)
            pictures = [name for name in config.pictures if file_named(name, group.members) is not None]
            named = (name for one in wanted_members(config) if (name := file_named(one, group.members)) is not None)
            if pictures and len(pictures) < config.needed_pictures:
                raise lacking(config, pictures, where)
            sample = to_sample(
                record,
                key=group.key,
                where=where,
                media=media if takes_media(config) else None,
                extension=extension,
                language=config.language,
                members={name: group.members[name] for name in named},
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
        return is_clip(sample.extension, sample.media) == is_video(self._config.kind)

    def _says(self, sample: Sample) -> bool:
        """Whether a sample has the caption or the label that the entry asks for, and passes its filter."""
        has = sample.label is not None if is_label(self._config.kind) else bool(sample.captions)
        return (has or not self._reads_captions) and matches(sample.meta, self._config.where)


def first_sample(config: DataEntryConfig, seconds: float) -> Sample | None:
    """Opens the first shard of a stream and reads to the first sample that an entry asks for.

    Args:
        config: The entry.
        seconds: After which the shard is given up.

    Returns:
        The sample; None where none was found in time, or none there while there are other shards.

    Raises:
        DataError: The shard cannot be opened or read, or is the only one and has no such sample.
    """
    begun = time.monotonic()
    reader = StreamReader(config, key=config.key, seed=0, buffer=1, reader=0, readers=1, first_shard=0)
    sample = reader.first(seconds)
    if sample is not None or time.monotonic() - begun >= seconds:
        return sample
    shards = expand_stream(config.source)
    broken = [one for one in reader.rejections if one.cause in SHARD_CAUSES]
    if broken or len(shards) == 1:
        last = (broken or reader.rejections)[-1].detail if reader.rejections else "no sample passes the filter"
        raise DataError(
            f"data source {config.source!r}: its first shard, {shards[0]}, gives no sample of kind {config.kind}: "
            f"{last}; mend the address, the kind or 'where'"
        )
    return None


def _with_bytes(archive: TarReader) -> Iterator[tuple[Member, bytes]]:
    """Members with their bytes; those that no sample needs, or that are refused, without.

    The members of one sample have no more bytes together than one of them may have.
    """
    key, held = "", 0
    for member in archive:
        held = (held if member.key == key else 0) + member.size
        key = member.key
        if held > MAX_MEMBER_BYTES and member.refused is None:
            member = replace(member, refused=f"the sample has {held} bytes so far; allowed: {MAX_MEMBER_BYTES}")
        if member.refused is None and matters(member.extension):
            yield member, archive.read(member)
        else:
            archive.skip(member)  # so that a cut is found before the sample in front of it is given, as in a list
            yield member, b""


def announce(config: DataEntryConfig) -> None:
    """Warns that a stream resumes at a shard."""
    warnings.warn(
        f"data source {config.source!r} is a stream: it is shuffled in a buffer instead of fully, and resumes by shard "
        f"instead of by sample",
        stacklevel=3,
    )

"""A bounded look at a source: whether it is there, and holds what a data entry asks for.

A source is opened to be read; that indexes all of it, which takes long where it is large and new. A glance uses the
indexes that there are, and of other shards reads the beginning of a few. Nothing is written.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.config import DataEntryConfig
from omnivl.data.index import ShardIndex
from omnivl.data.index_file import glance_at_index
from omnivl.data.sources import open_source
from omnivl.data.sources.base import SHARD_CAUSES, Source
from omnivl.data.sources.emoji import EMBEDDED
from omnivl.data.sources.generated import GENERATED
from omnivl.data.sources.opening import is_stream
from omnivl.data.sources.patterns import expand_pattern
from omnivl.data.sources.presence import unreadable_shards, why_unreadable
from omnivl.data.sources.shards import ShardSource, index_path
from omnivl.data.sources.stream import expand_stream, first_sample
from omnivl.errors import DataError

BUNDLED = (*EMBEDDED, *GENERATED)
"""Sources that are part of the package; they are opened as a run opens them."""

MOST_NAMES = 10_000
"""Shards whose presence is looked at, evenly spread."""
MOST_SHARDS = 256
"""Shards whose indexes are read, evenly spread."""
MOST_READ = 8
"""Shards without an index whose beginning is read."""
MOST_SAMPLES = 2_000
"""Samples of the beginning of a shard."""
MOST_SECONDS = 10.0
"""Seconds after which no further shard, and no further sample of one, is looked at."""


@dataclass(frozen=True)
class Glance:
    """What was seen of a source.

    Attributes:
        source: The samples found that the entry asks for; None if none was found, or the source is a stream.
        shards: Number of its shards; 1 where it has none.
        looked_at: Number of shards of which something was read.
        whole: Whether nothing was left out. If so, ``source`` is what a run will read.
        bad_shards: What is wrong with shards that were looked at.
    """

    source: Source | None
    shards: int = 1
    looked_at: int = 1
    whole: bool = True
    bad_shards: tuple[str, ...] = ()

    @property
    def left_out(self) -> str:
        """What was not looked at, in words."""
        if self.looked_at == 0:
            return "a stream, which is not opened"
        return f"looked at {self.looked_at:,} of {self.shards:,} shards, of new ones at their first samples only"


def glance(
    config: DataEntryConfig,
    *,
    seed: int,
    index_cache: str | None = None,
    num_frames: int = 8,
    size: int = 64,
    open_streams: bool = False,
    seconds: float = MOST_SECONDS,
) -> Glance:
    """Looks at what ``config.source`` names.

    Args:
        config: The entry.
        seed: See ``open_source``.
        index_cache: See ``open_source``.
        num_frames: See ``open_source``.
        size: See ``open_source``.
        open_streams: Whether commands are run and addresses fetched; of a stream at most the first shard is read.
        seconds: After which no further sample is looked at, at most ``MOST_SECONDS``.

    Raises:
        DataError: There is no such source, a shard that it names is missing, or it has no sample of this kind.
    """
    if config.source in BUNDLED:
        opened = open_source(config, seed=seed, index_cache=index_cache, num_frames=num_frames, size=size)
        return Glance(opened)
    if is_stream(config.source):
        return _glance_at_stream(config, open_streams and seconds > 0, min(seconds, MOST_SECONDS))
    paths = expand_pattern(config.source)
    _check_presence(config, paths)
    clock = _Clock(time.monotonic() + min(seconds, MOST_SECONDS))
    shards, indexes, whole = _indexes(paths, index_cache, clock)
    bad = tuple(
        f"{entry.where}: {entry.detail}"
        for index in indexes
        for entry in index.rejections
        if entry.cause in SHARD_CAUSES
    )
    whole = whole and len(shards) == len(paths)
    try:
        source = ShardSource(config, shards, indexes=indexes)
    except DataError:
        if whole or len(bad) == len(paths):
            raise
        return Glance(None, len(paths), len(shards), whole, bad)
    return Glance(source, len(paths), len(shards), whole, bad)


@dataclass(frozen=True)
class _Clock:
    """When a look ends."""

    end: float

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def enough(self, samples: int) -> bool:
        """Whether the beginning of a shard has been read."""
        return samples >= MOST_SAMPLES or self.is_over()


def _glance_at_stream(config: DataEntryConfig, open_streams: bool, seconds: float) -> Glance:
    shards = expand_stream(config.source)
    if not open_streams:
        return Glance(None, len(shards), 0, whole=False)
    first_sample(config, seconds)
    return Glance(None, len(shards), 1, whole=False)


def _check_presence(config: DataEntryConfig, paths: tuple[str, ...]) -> None:
    """Refuses shards that cannot be opened.

    Raises:
        DataError: Names the first of them, and their number.
    """
    chosen = [paths[place] for place in _spread(len(paths), MOST_NAMES)]
    with ThreadPoolExecutor(8) as pool:
        reasons = pool.map(why_unreadable, chosen)
        wrong = [(path, reason) for path, reason in zip(chosen, reasons, strict=True) if reason is not None]
    if wrong:
        raise unreadable_shards(config.source, wrong, len(chosen))


def _spread(count: int, most: int) -> Iterator[int]:
    """At most ``most`` of ``range(count)``, evenly spread, the first and the last among them."""
    if count <= most:
        return iter(range(count))
    return (place * (count - 1) // (most - 1) for place in range(most))


def _indexes(
    paths: tuple[str, ...], index_cache: str | None, clock: _Clock
) -> tuple[list[str], list[ShardIndex], bool]:
    """Shards with their indexes, and whether all of these are those of whole shards.

    The beginnings that are read are spread evenly as well.
    """
    chosen = [paths[place] for place in _spread(len(paths), MOST_SHARDS)]
    read = {chosen[place] for place in _spread(len(chosen), MOST_READ)}
    shards: list[str] = []
    found: list[ShardIndex] = []
    whole = True

    def skip(_: int) -> bool:
        return True

    for path in chosen:
        if clock.is_over() and shards:
            break
        enough: Callable[[int], bool] = clock.enough if path in read else skip
        index, is_whole = glance_at_index(Path(path), path, index_path(path, index_cache), enough)
        if path in read or is_whole:
            shards.append(path)
            found.append(index)
            whole = whole and is_whole
    return shards, found, whole
